"""Copies of small tables from the host to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return `tensor` of the host on `device`, on a CUDA GPU without waiting for what the GPU is doing.

    On an Apple GPU it waits: a copy that does not wait there reads the memory of `tensor` later, when it may have been
    given to something else, and nobody notices the wrong numbers (pytorch/pytorch#189690).
    """
    return tensor.to(device, non_blocking=torch.device(device).type != "mps")
