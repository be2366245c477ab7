"""Counts what makes the host wait for the device, on a machine without one."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts the operators whose result has a size or a value that only the device knows, and copies that block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for i in a
        )
        asks = {"_local_scalar_dense", "nonzero", "masked_select", "nms", "_unique2", "repeat_interleave"}
        # An int as repeats is a shape of the host; it never arrives here as the operator of that name.
        if name in asks or by_mask:
            self.found[name] += 1
        # From ordinary memory of the host; PyTorch waits for the stream then. The device may be "meta".
        if name == "_to_copy" and not (kwargs or {}).get("non_blocking"):
            target = (kwargs or {}).get("device")
            if target is not None and torch.device(target).type != args[0].device.type:
                self.found["blocking copy"] += 1
        return func(*args, **(kwargs or {}))
