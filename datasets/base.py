"""What every detection data set of this package has in common."""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

from datasets.copy_paste import CopyPaste
from util.errors import UserError


def mixed_seed(*parts: int) -> int:
    """Return a 63-bit seed that depends on all `parts`; neighbours give unrelated streams."""
    entropy = [part % 2**32 for part in parts]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def silent_coco(ground_truth: dict) -> COCO:
    """Return a pycocotools object of a COCO-format dict, without its progress lines."""
    coco = COCO()
    coco.dataset = ground_truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class DetectionDataset(Dataset, ABC):
    """Images with boxes. A subclass says how one image is read (`load`) and what the ground truth is (`ground_truth`).

    Augmentation is a function of (seed, epoch, index) only: not of the worker, not of what was read before. So a run
    that is resumed in the middle of an epoch sees the same pixels as one that was not interrupted.

    Attributes:
        class_names: name of every model label; "N/A" for labels that no category uses.
        category_ids: category id in the annotation file of every model label; -1 for labels that no category uses.
        image_ids: image id of every index.
    """

    class_names: list[str]
    category_ids: list[int]
    image_ids: list[int]

    def __init__(self, *, transforms: nn.Module, seed: int = 0) -> None:
        self.transforms = transforms
        self.seed = seed
        self.paste: CopyPaste | None = None  # mixes objects of a second image into every one
        # Shared memory: persistent workers are copies of the data set and must still see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @abstractmethod
    def load(self, index: int) -> tuple[Tensor, dict]:
        """Return the image, uint8 RGB (3, h, w), and its sample (see `datasets.transforms`) before any transform."""

    @abstractmethod
    def ground_truth(self) -> dict:
        """Return the annotations as a COCO-format dict, for evaluation; crowd regions included."""

    def set_classes(self, categories: dict[int, str], *, raw: bool, num_classes: int | None = None) -> None:
        """Fix which model label stands for which category.

        Args:
            categories: name by category id. raw: label = category id; else labels 0..K-1 in the order of the ids.
            num_classes: more labels than needed, for weights that have them; the added ones are never used.
        """
        needed = max(categories) + 1 if raw else len(categories)
        count = needed if num_classes is None else num_classes
        if count < needed:
            raise UserError(f"--num_classes {count}: these annotations need {needed}; raise it or leave it out")
        ids = range(count) if raw else sorted(categories) + [-1] * (count - needed)
        self.category_ids = [i if i in categories else -1 for i in ids]
        self.class_names = [categories.get(i, "N/A") for i in self.category_ids]

    def cache(self, indices: Iterable[int]) -> None:
        """Keep these images in memory where they come from files (`--cache_mode`)."""

    def load_image(self, index: int) -> Image.Image:
        """Return the RGB image as it is in the file, for drawing."""
        return to_pil_image(self.load(index)[0])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of this epoch, in all workers."""
        self._epoch.fill_(epoch)

    @cached_property
    def coco(self) -> COCO:
        """The ground truth as a pycocotools object. Made on first use: training never pays for it."""
        return silent_coco(self.ground_truth())

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, sample = self.load(index)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would also reseed the GPU of a process that loads without workers.
            torch.default_generator.manual_seed(mixed_seed(self.seed, int(self._epoch), index))
            image, sample = self.transforms(image, sample)
            if self.paste is None:
                return image, sample
            second = int(torch.randint(len(self), ()))
            return self.paste(image, sample, *self.transforms(*self.load(second)))

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("coco", None)  # python objects per annotation: not for spawned workers
        return state
