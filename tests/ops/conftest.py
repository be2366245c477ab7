"""Fixtures of several tests of the operators."""

import pytest

import ops
from ops.selection import ISA_VARIABLE

ISAS = ("avx512", "avx2", "portable")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Compute with one instruction set after the other; those that this machine does not have are skipped."""
    if "cpu" not in ops.backends():
        pytest.skip("backend cpu is not available here: no C++ compiler or no ninja")
    if request.param not in ops.cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    ops.set_backend("cpu")
    yield request.param
    ops.set_backend("auto")
