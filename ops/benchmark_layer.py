"""Times and memory of the attention layer with the fused operator and without; a part of ops/benchmark.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import ops

WAYS = {"unfused": False, "fused": True}

# By name: what to be in while measuring, and what to call. Returns the seconds of each call.
Runs = dict[str, tuple[Callable[[], AbstractContextManager], Callable[[], object]]]
Measure = Callable[[Runs], dict[str, list[float]]]


@dataclass
class LayerRow:
    """What one way takes in one case: seconds, and bytes that a backward pass finds kept."""

    shape: str
    mode: str
    dtype: str
    backend: str
    threads: int
    way: str
    median: float
    least: float
    most: float
    ratio: float  # how many times faster than unfused
    kept: int
    device: str = "cpu"
    ratio_least: float = 0.0  # of one turn
    ratio_most: float = 0.0


@contextmanager
def way(name: str) -> Iterator[None]:
    """Let the layer compute in one of the `WAYS`."""
    before = ops.selection.fused()
    ops.set_fused(WAYS[name])
    try:
        yield
    finally:
        ops.set_fused(before)


class LayerCase:
    """A layer of random weights with inputs like those of an encoder (references are centres) or a decoder (boxes)."""

    def __init__(self, levels: Sequence[tuple[int, int]], reference: Tensor, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.levels = levels
        # Half precision is that of autocast: weights and inputs in float32.
        self.autocast = dtype in (torch.float16, torch.bfloat16)
        kind, self.dtype, self.device = (torch.float32 if self.autocast else dtype), dtype, device
        self.layer = ops.MSDeformAttn().to(device, kind)
        torch.nn.init.normal_(self.layer.sampling_offsets.weight, std=0.05)
        torch.nn.init.normal_(self.layer.attention_weights.weight, std=0.05)
        batch, queries = reference.shape[:2]
        cells = sum(h * w for h, w in levels)
        self.query = torch.randn(batch, queries, 256).to(device, kind).requires_grad_()
        self.memory = torch.randn(batch, cells, 256).to(device, kind).requires_grad_()
        self.reference = reference.to(device, kind)
        self.grad = torch.randn(batch, queries, 256).to(device, dtype)

    def forward(self) -> Tensor:
        """Return the layer's output."""
        with torch.autocast(self.device, self.dtype, enabled=self.autocast):
            return self.layer(self.query, self.reference, self.memory, self.levels)

    def alone(self) -> Tensor:
        """Return the output without recording."""
        with torch.no_grad():
            return self.forward()

    def with_backward(self) -> None:
        """Compute the output and all gradients."""
        self.forward().backward(self.grad)
        self.layer.zero_grad()
        self.query.grad = self.memory.grad = None

    def kept(self) -> int:
        """Return the bytes that are kept for the backward pass, weights and inputs of the layer left out."""
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.forward()  # kept alive: its memory must not be given to another tensor while we count
        own = [*self.layer.parameters(), self.query, self.memory, self.reference, output]
        for tensor in own:
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(storages.values())


def reference_points(queries: int | None, levels: int, centres: Tensor, batch: int) -> Tensor:
    """Return the centres of all cells (batch, cells, levels, 2) for an encoder, random boxes (..., 4) for a decoder."""
    if queries is None:
        return centres[None, :, None].expand(batch, -1, levels, -1).contiguous()
    boxes = torch.rand(batch, queries, 1, 4, generator=torch.Generator().manual_seed(0))
    boxes[..., 2:] = boxes[..., 2:] * 0.3 + 0.02
    return boxes.expand(-1, -1, levels, -1).contiguous()


def rows(case: LayerCase, labels: tuple[str, str, str], threads: int, measure: Measure) -> Iterator[LayerRow]:
    """Measure one case; `labels` are shape, type and backend."""
    kept = {}
    for name in WAYS:
        with way(name):
            kept[name] = case.kept()
    for mode, call in (("forward", case.alone), ("forward+backward", case.with_backward)):
        samples = measure({name: (lambda name=name: way(name), call) for name in WAYS})
        base = statistics.median(samples["unfused"])
        for name in WAYS:
            middle = statistics.median(samples[name])
            seconds = (middle, min(samples[name]), max(samples[name]))
            gains = [a / b for a, b in zip(samples["unfused"], samples[name], strict=True)]
            shape, dtype, backend = labels
            row = LayerRow(shape, mode, dtype, backend, threads, name, *seconds, base / middle, kept[name])
            row.device, row.ratio_least, row.ratio_most = case.device, min(gains), max(gains)
            yield row
