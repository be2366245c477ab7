"""The stored arrays of a Co-DETR model: compared one by one, and none is forgotten."""

from __future__ import annotations

import numpy as np
from torch import Tensor

ABSOLUTE = RELATIVE = 1e-4  # allowed difference of logits and relative boxes, of the stored `tolerances`
BOX_PIXELS = 0.05  # of boxes in pixels


def subsample(values: Tensor, count: int = 4000) -> Tensor:
    """Return the elements that a case stores of a large array."""
    flat = values.detach().flatten()
    return flat[:: max(1, len(flat) // count)]


class Stored:
    """The arrays of a case whose names begin with `prefix`; `unread` are those of the case not compared so far."""

    def __init__(self, arrays: dict[str, np.ndarray], prefix: str = "", unread: set[str] | None = None) -> None:
        self.arrays, self.prefix = arrays, prefix
        self.unread = set(arrays) if unread is None else unread

    def part(self, prefix: str) -> Stored:
        """Return the same arrays, called by their names after `prefix`."""
        return Stored(self.arrays, self.prefix + prefix, self.unread)

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.arrays

    def take(self, key: str) -> np.ndarray:
        """Return an array; from now on it counts as compared."""
        self.unread.discard(self.prefix + key)
        return self.arrays[self.prefix + key]

    def close(self, key: str, ours: Tensor, absolute: float = ABSOLUTE, relative: float = RELATIVE) -> None:
        """Assert that every number is within the tolerance of the stored one."""
        stored, ours = self.take(key), np.asarray(ours.detach(), dtype=np.float64)
        name = self.prefix + key
        assert ours.shape == stored.shape, f"{name}: shape {ours.shape}, stored {stored.shape}"
        found = np.abs(ours - stored)
        excess = found > absolute + relative * np.abs(stored)
        assert not excess.any(), f"{name}: differs by {found.max():.3g}, {excess.mean():.1%} beyond the tolerance"

    def same(self, key: str, ours: Tensor) -> None:
        """Assert equal integers."""
        assert not ours.is_floating_point(), f"{self.prefix}{key}: {ours.dtype} is no integer"
        np.testing.assert_array_equal(ours.numpy(), self.take(key), err_msg=self.prefix + key)
