"""Which implementation of the operator runs: the compiled kernels where there are any, plain PyTorch elsewhere.

Automatic unless forced by `set_backend` or, below that, by the environment variable ASSIGNDETR_OPS_BACKEND. The `cpu`
kernel takes the fastest instruction set of the machine unless ASSIGNDETR_CPU_ISA names another: avx512, avx2, portable.
It is read in every call, so that tests and benchmarks can go through all of them.

The attention layer uses the fused operator (ops/fused.py) with every backend. `set_fused(False)` or ASSIGNDETR_FUSED=0
in the environment, read at import, let it compute locations and weights first: to compare, or to look at them.
"""

import os
import sys

import torch

from . import build

BACKENDS = ("reference", "cpu", "cuda")
VARIABLE = "ASSIGNDETR_OPS_BACKEND"
ISA_VARIABLE = "ASSIGNDETR_CPU_ISA"  # kIsaVariable in csrc/cpu_dispatch.h
FUSED_VARIABLE = "ASSIGNDETR_FUSED"

_forced = "auto"
_asked = os.environ.get(FUSED_VARIABLE) or "1"  # read here, as graphs that are compiled cannot read it
if _asked not in ("0", "1"):
    raise ValueError(f"{FUSED_VARIABLE} is '{_asked}'; allowed: 0, 1")
_fused = _asked == "1"
_failed: dict[str, str] = {}  # kernel -> why it could not be loaded; one attempt per process
_loaded: set[str] = set()
_reported: set[str] = set()  # kernels whose absence has been printed


def set_backend(name: str) -> None:
    """Force an implementation for all later calls of the operator, compiled graphs included.

    Args:
        name: "reference", "cpu" or "cuda"; "auto" goes back to ASSIGNDETR_OPS_BACKEND or, where that is not set, to the
            compiled kernel of the tensors' device, and to the reference if there is none.

    Raises:
        ValueError: if the name is unknown or that backend can neither be found nor built here.
    """
    global _forced
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown ops backend '{name}'; allowed: auto, {', '.join(BACKENDS)}")
    if name not in ("auto", "reference") and (reason := _why_unavailable(name)):
        raise ValueError(f"the ops backend '{name}' is not available: {reason}. Available: {', '.join(backends())}")
    _forced = name


def set_fused(on: bool) -> None:
    """Let `MSDeformAttn` use the fused operator, as it does at first unless ASSIGNDETR_FUSED=0, or not.

    Results differ by rounding only. Graphs that torch.compile made before are compiled anew.
    """
    global _fused
    _fused = on


def fused() -> bool:
    """Return whether `MSDeformAttn` uses the fused operator."""
    return _fused


def backends() -> tuple[str, ...]:
    """Return the backends that are ready here or can be built on first use. Compiles nothing."""
    return tuple(name for name in BACKENDS if name == "reference" or _why_unavailable(name) is None)


def active_backend(device: torch.device | str) -> str:
    """Return the backend that computes tensors on `device`. Compiles the kernel if it is needed and was not built yet.

    Raises:
        ValueError: if a backend is forced that does not fit the device or is not available.
    """
    kind = torch.device(device).type
    name = _forced if _forced != "auto" else os.environ.get(VARIABLE) or "auto"
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{VARIABLE} is '{name}'; allowed: auto, {', '.join(BACKENDS)}")
    if name == "reference":
        return name
    if name != "auto":
        if name != kind:
            raise ValueError(
                f"the ops backend '{name}' is forced, but the tensors are on '{kind}'; use auto or reference"
            )
        if not _load(name):
            raise ValueError(f"the ops backend '{name}' is forced but not available: {_failed[name]}")
        return name
    if kind in build.KERNELS:
        if _load(kind):
            return kind
        _report(kind)
    return "reference"


def cpu_isas() -> tuple[str, ...]:
    """Return the instruction sets the `cpu` kernel can use on this machine, the fastest first.

    Raises:
        ValueError: if there is no `cpu` kernel. It is compiled if it was not before.
    """
    if not _load("cpu"):
        raise ValueError(f"the ops backend 'cpu' is not available: {_failed['cpu']}")
    return tuple(torch.ops.assigndetr_ext.cpu_isas())


def use_compiled(kind: str, otherwise: str) -> bool:
    """Return whether compiled code that belongs to no device runs, building it if it was not built yet.

    It does not where it cannot be built, which is said once, and never with the backend "reference".

    Args:
        kind: of `build.SOURCES`.
        otherwise: what runs without it, for the message.
    """
    name = _forced if _forced != "auto" else os.environ.get(VARIABLE)
    if name == "reference":
        return False
    if not _load(kind):
        _report(kind, otherwise)
    return kind in _loaded


def _load(kind: str) -> bool:
    """Load a compiled kernel, building it if necessary; False, with the reason in `_failed`, if that fails."""
    if kind not in _loaded and kind not in _failed:
        try:
            build.load(kind)
            _loaded.add(kind)
        except build.BuildError as error:
            _failed[kind] = str(error)
    return kind in _loaded


def _report(kind: str, otherwise: str = "the slower reference") -> None:
    """Say once, on one line and from one process per machine, that the compiled kernel is missing."""
    if kind in _reported:
        return
    _reported.add(kind)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"ops: no {kind} kernel, using {otherwise}: {_failed[kind]}. To build it: {build.HOW_TO_BUILD}",
            file=sys.stderr,
            flush=True,
        )


def _why_unavailable(kind: str) -> str | None:
    if kind in _loaded:
        return None
    if kind in _failed:
        return _failed[kind]
    if kind == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if build.built_library(kind):
        return None
    return build.why_not_on_first_use(kind)
