"""The deformable attention operator and its module, on every backend that works here."""

from __future__ import annotations

import numpy as np
import torch

import ops
from ops.module import MSDeformAttn
from tests.golden.case import checkpoint
from tests.golden.runners.common import assert_close, assert_relative, subcases


def _backends() -> list[str]:
    return [name for name in ("reference", "cpu") if name in ops.backends()]


def run_operator(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for backend in _backends():
        ops.set_backend(backend)
        try:
            for name, stored in subcases(arrays).items():
                for dtype in (torch.float64, torch.float32):
                    _operator(f"{backend} {name} {dtype}", stored, dtype, meta["tolerances"])
        finally:
            ops.set_backend("auto")


def _operator(name: str, stored: dict[str, np.ndarray], dtype: torch.dtype, tolerances: dict) -> None:
    tolerance = tolerances["float64" if dtype == torch.float64 else "float32"]

    def leaf(key: str) -> torch.Tensor:
        return torch.from_numpy(stored[key]).to(dtype).requires_grad_()

    value, locations = leaf("value_f64"), leaf("sampling_locations_f64")
    weights = leaf("attention_weights_f64")
    shapes = [tuple(s) for s in stored["shapes"].tolist()]
    output = ops.ms_deform_attn(value, shapes, locations, weights)
    assert_close(f"{name} output", output, stored["output_f64"], tolerance)
    output.backward(torch.from_numpy(stored["grad_output_f64"]).to(dtype))
    grads = {"value": value, "sampling_locations": locations, "attention_weights": weights}
    for key, tensor in grads.items():
        if f"grad_{key}_f64" in stored:
            want = stored[f"grad_{key}_f64"]
            # float64 has to agree absolutely; the rounding of float32 grows with the number itself.
            rtol = tolerance if dtype == torch.float32 else 0.0
            where = f"{name} gradient of {key}"
            np.testing.assert_allclose(tensor.grad.numpy(), want, rtol=rtol, atol=tolerance, err_msg=where)


def run_module(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    fresh = MSDeformAttn(**meta["flags"])
    assert_close("initial offsets", fresh.sampling_offsets.bias, arrays["init_sampling_offsets_bias_f64"], 1e-6)
    for backend in _backends():
        ops.set_backend(backend)
        try:
            for dtype in (torch.float64, torch.float32):
                for numbers in (2, 4):
                    _module(f"{backend} {dtype} reference{numbers}", meta, arrays, dtype, numbers)
        finally:
            ops.set_backend("auto")


def _module(name: str, meta: dict, arrays: dict[str, np.ndarray], dtype: torch.dtype, numbers: int) -> None:
    tolerance = meta["tolerances"]["float64" if dtype == torch.float64 else "float32"]
    module = MSDeformAttn(**meta["flags"])
    module.load_state_dict(checkpoint(meta))
    module.to(dtype)

    def leaf(key: str) -> torch.Tensor:
        return torch.from_numpy(arrays[key]).to(dtype).requires_grad_()

    query, memory, reference = leaf("query_f64"), leaf("input_f64"), leaf(f"reference{numbers}_f64")
    shapes = [tuple(s) for s in meta["shapes_hw"]]
    output = module(query, reference, memory, shapes, torch.from_numpy(arrays["mask"]))
    assert_close(f"{name} output", output, arrays[f"output{numbers}_f64"], tolerance)
    output.backward(torch.from_numpy(arrays["grad_output_f64"]).to(dtype))
    for key, tensor in {"query": query, "input": memory, "reference": reference}.items():
        want = arrays[f"grad_{key}{numbers}_f64"]
        assert_close(f"{name} gradient of {key}", tensor.grad, want, tolerance)
    for key, parameter in module.named_parameters():
        want = arrays[f"grad{numbers}.{key}.norm_f64"]
        assert_relative(f"{name} gradient of {key}", parameter.grad.norm(), want, tolerance)
