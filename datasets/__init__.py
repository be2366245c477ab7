"""Data sets: `build_dataset` -> `build_train_loader` / `build_eval_loader` -> batches `(ImageBatch, list[Target])`."""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from datasets.base import DetectionDataset
from datasets.coco import build_coco
from datasets.collate import collate
from datasets.copy_paste import CopyPaste
from datasets.lsj import lsj_steps
from datasets.samplers import NodeCacheBatchSampler, TrainBatchSampler, eval_indices
from datasets.synthetic import build_synthetic
from datasets.transforms import DropEmpty, eval_transforms, train_transforms
from util.errors import UserError

__all__ = [
    "DetectionDataset",
    "build_dataset",
    "build_eval_loader",
    "build_train_loader",
    "check_same_categories",
    "collate",
]

BUILDERS = {"coco": build_coco, "synthetic": build_synthetic}  # the values of --dataset_file


def build_dataset(image_set: str, args: argparse.Namespace) -> DetectionDataset:
    """Return the `train` or `val` images with the transforms of training or evaluation.

    Raises:
        UserError: a file is missing or wrong, or there is no image; says which and what to do.
    """
    if image_set not in ("train", "val"):
        raise ValueError(f"image_set {image_set!r}: use train or val")
    dataset = BUILDERS[args.dataset_file](image_set, args, transforms=build_transforms(image_set, args))
    if args.copy_paste and image_set == "train":
        dataset.paste = CopyPaste(args.copy_paste)
    if len(dataset) == 0:
        raise UserError(
            f"the {image_set} set has no images; look at `images` in its annotation file (--{image_set}_json or "
            f"--coco_path), or at --synthetic_{image_set}"
        )
    return dataset


def build_transforms(image_set: str, args: argparse.Namespace) -> nn.Module:
    """Return the transform of samples that the flags describe."""
    if args.augment == "lsj":
        train, scale = image_set == "train", tuple(args.lsj_scale)
        steps = lsj_steps(train=train, size=args.lsj_size, scale=scale, antialias=args.antialias)
        return v2.Compose([*steps, DropEmpty()])
    if image_set == "val":
        return eval_transforms(test_size=args.test_size, max_size=args.max_size, antialias=args.antialias)
    return train_transforms(
        augment=args.augment,
        scales=args.train_scales,
        crop_scales=args.crop_scales,
        crop_range=tuple(args.crop_range),
        max_size=args.max_size,
        test_size=args.test_size,
        antialias=args.antialias,
    )


def check_same_categories(train: DetectionDataset, val: DetectionDataset) -> None:
    """Raise a UserError unless both sets give the same category the same model label."""
    mine, other = (list(zip(d.category_ids, d.class_names)) for d in (train, val))
    if mine != other:
        odd = next(i for i in range(len(mine) + 1) if mine[i : i + 1] != other[i : i + 1])
        shown = [str(pairs[odd]) if odd < len(pairs) else "nothing" for pairs in (mine, other)]
        raise UserError(
            f"the training and validation annotations have different categories: label {odd} is (category id, name) "
            f"{shown[0]} in training and {shown[1]} in validation; write the same `categories` list into both files"
        )


def build_train_loader(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    cache_mode: bool = False,
    local_rank: int = 0,
    local_size: int = 1,
) -> DataLoader:
    """Return the shuffled loader of one process, `batch_size` images per step.

    `loader.batch_sampler.set_epoch(epoch, start_batch=0)` chooses order and augmentation; `len(loader)` is the number
    of batches of a whole epoch.
    """
    shared = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
    if cache_mode:
        sampler = NodeCacheBatchSampler(dataset, **shared, local_rank=local_rank, local_size=local_size)
        dataset.cache(range(local_rank, len(dataset), local_size))
    else:
        sampler = TrainBatchSampler(dataset, **shared)
    return _loader(dataset, num_workers, pin_memory, batch_sampler=sampler)


def build_eval_loader(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Return the loader of one process; every image comes exactly once over all processes, in no padded copies.

    Shares may differ by one image, so do not pair collectives with its steps.
    """
    indices = eval_indices(len(dataset), rank, world_size)
    return _loader(dataset, num_workers, pin_memory, batch_size=batch_size, sampler=indices)


def _loader(dataset: DetectionDataset, num_workers: int, pin_memory: bool, **batching) -> DataLoader:
    return DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else every iterator draws from the default generator, which the model uses
        **batching,
    )
