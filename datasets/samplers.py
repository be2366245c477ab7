"""Which process sees which image when.

The order of an epoch is one permutation drawn from (seed, epoch). For W processes with b images each, global batch t is
its slice [t * W * b, (t + 1) * W * b), and process r takes the r-th contiguous part of that. So two processes with
batch b see together, step by step, what one process with batch 2b sees.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from datasets.base import DetectionDataset, mixed_seed
from util.errors import UserError


class TrainBatchSampler(Sampler[list[int]]):
    """Shuffled batches of one process; the incomplete last batch is dropped.

    A set smaller than one global batch makes one smaller batch per process, all equally large, padded by the head of
    the order.
    """

    def __init__(
        self, dataset: DetectionDataset, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.rank, self.world_size = rank, world_size
        self.steps = len(dataset) // (batch_size * world_size)
        self.batch_size = batch_size if self.steps else -(-len(dataset) // world_size)
        self.steps = max(self.steps, 1)
        self.epoch = self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the order and the augmentation of `epoch`.

        Args:
            start_batch: batches of this epoch that a run being resumed has done; iteration starts after them.
        """
        self.epoch, self.start_batch = epoch, start_batch
        self.dataset.set_epoch(epoch)

    def order(self) -> list[int]:
        """Return the image indices of this epoch that this process' batches are cut from."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def _slice(self, step: int) -> tuple[int, int]:
        first = (step * self.world_size + self.rank) * self.batch_size
        return first, first + self.batch_size

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever `start_batch` is."""
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for step in range(self.start_batch, self.steps):
            first, last = self._slice(step)
            yield [order[i % len(order)] for i in range(first, last)]


class NodeCacheBatchSampler(TrainBatchSampler):
    """For `--cache_mode`: local rank l of every node serves the images whose index is l modulo the local size.

    So a process needs only its share of the encoded images in memory. Ranks count node by node, as torchrun numbers
    them. No image appears twice in an epoch.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
    ) -> None:
        super().__init__(dataset, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        self.local_rank, self.local_size = local_rank, local_size
        share = len(dataset) // world_size  # of the smallest shard and node: every process makes equally many steps
        if share == 0:
            raise UserError(f"--cache_mode: {len(dataset)} images for {world_size} processes; leave --cache_mode out")
        self.steps = share // batch_size
        self.batch_size = batch_size if self.steps else share
        self.steps = max(self.steps, 1)

    def order(self) -> list[int]:
        return [i for i in super().order() if i % self.local_size == self.local_rank]

    def _slice(self, step: int) -> tuple[int, int]:
        nodes, node = self.world_size // self.local_size, self.rank // self.local_size
        first = (step * nodes + node) * self.batch_size
        return first, first + self.batch_size


def eval_indices(length: int, rank: int, world_size: int) -> range:
    """Return the indices of one process: every image once over all of them, nothing repeated to make shares equal."""
    return range(rank, length, world_size)
