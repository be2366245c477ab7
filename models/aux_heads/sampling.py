"""Random samples of positives and negatives for a loss, as many for every image (Faster R-CNN, section 3.1.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampled:
    """S of the N boxes of each image: positives first, then negatives, then empty slots (neither)."""

    index: Tensor  # (B, S) int64 in [0, N)
    positive: Tensor  # (B, S) bool
    negative: Tensor  # (B, S) bool

    @property
    def taken(self) -> Tensor:
        """(B, S) bool: slots that are not empty."""
        return self.positive | self.negative

    def of(self, values: Tensor) -> Tensor:
        """Return the rows (B, S, ...) of `values` (B, N, ...) that were taken."""
        index = self.index.view(*self.index.shape, *[1] * (values.dim() - 2))
        return values.gather(1, index.expand(*self.index.shape, *values.shape[2:]))


def random_keys(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return independent uniform numbers; the smallest keys are taken. Tests replace it to pin the choice."""
    return torch.rand(shape, device=device)


@torch.no_grad()
def sample(positive: Tensor, negative: Tensor, *, total: int, fraction: float) -> Sampled:
    """Take up to `total` boxes of each image at random, without asking the device how many there are.

    At most `int(total * fraction)` are positives; negatives fill up. Inside each kind the order is that of the boxes.

    Args:
        positive, negative: (B, N) bool, disjoint; boxes that are neither are never taken.
        total: largest number of boxes of an image.
        fraction: largest share of positives in `total`, in [0, 1].

    Returns:
        S = min(total, N) slots for each image.
    """
    count = positive.shape[1]
    keys = random_keys(tuple(positive.shape), positive.device)
    first, is_positive = _smallest(keys, positive, min(int(total * fraction), count))
    second, is_negative = _smallest(keys, negative, min(total, count))
    room = total - is_positive.sum(1, keepdim=True)
    is_negative &= torch.arange(second.shape[1], device=keys.device) < room
    # One sort brings both kinds into order: positives count from 0, negatives from N, empty slots from 2 N.
    ranks = torch.cat(
        [torch.where(is_positive, first, 2 * count), torch.where(is_negative, second + count, 2 * count)], 1
    )
    ranks = ranks.sort(1).values[:, : min(total, count)]
    return Sampled(ranks % count, ranks < count, (ranks >= count) & (ranks < 2 * count))


def _smallest(keys: Tensor, member: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the indices (B, k) of the members with the smallest keys, and which of the k really are members."""
    values, index = keys.masked_fill(~member, torch.inf).topk(k, dim=1, largest=False)
    return index, values < torch.inf
