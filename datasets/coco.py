"""COCO and every other data set in COCO's annotation format."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from datasets.annotations import mend_coco, pack, read_coco
from datasets.base import DetectionDataset
from datasets.files import ImageFiles
from datasets.transforms import has_area, keep_objects
from util.dist import info
from util.errors import UserError

# The 80 category ids of COCO: 1..90 with ten holes. Published weights use them directly as labels.
COCO_IDS = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}

MASKS_FOR_PASTING = "--copy_paste cuts objects out along their masks; leave it out for annotations of boxes only"


class CocoDetection(DetectionDataset):
    """Images of a folder, boxes of a COCO-format file.

    Images come in the order of their ids; those without objects are kept. Crowd regions are no targets, but the
    evaluation knows them. Images are opened as RGB and, as in the published code, not turned by their EXIF tag.

    Args:
        images: folder that the `file_name`s of the annotation file are relative to.
        annotations: COCO-format JSON file.
        category_ids: `contiguous`, `raw` or `auto`, see `--category_ids`.
        num_classes: number of labels, at least what the file needs; None: as the file needs.
        masks_for: who needs masks and the way out, for messages; empty: samples have no masks.
        flags: the command-line flags that named folder and file, for messages.

    Raises:
        UserError: see `datasets.annotations`; also when the first image is not in the folder.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        *,
        transforms: nn.Module,
        seed: int = 0,
        category_ids: str = "auto",
        num_classes: int | None = None,
        masks_for: str = "",
        flags: tuple[str, str] = ("--train_images", "--train_json"),
    ) -> None:
        super().__init__(transforms=transforms, seed=seed)
        self.folder, self.path, self.flags = Path(images), Path(annotations), flags
        data = read_coco(self.path, flags[1])
        notes = mend_coco(data, self.path)
        categories = {category["id"]: category["name"] for category in data["categories"]}
        raw = category_ids == "raw" or (category_ids == "auto" and set(categories) == COCO_IDS)
        self.set_classes(categories, raw=raw, num_classes=num_classes)
        entries = sorted(data["images"], key=lambda image: image["id"])
        self.files = ImageFiles(self.folder, entries, self.path)
        self.image_ids = self.files.ids
        labels = {category_id: label for label, category_id in enumerate(self.category_ids) if category_id >= 0}
        self._packed, more = pack(data, self.image_ids, labels, self.path, masks_for=masks_for)
        self._encoded: dict[int, bytes] = {}
        for note in notes + more:
            info(note)
        if entries:
            self.files.check_folder(flags[0])

    def cache(self, indices: Iterable[int]) -> None:
        """Read these image files into memory, still encoded; forked workers share the pages."""
        self._encoded = {index: self.files.read(index) for index in indices}
        gigabytes = sum(map(len, self._encoded.values())) / 1e9
        info(f"{self.folder}: {len(self._encoded)} encoded images kept in memory, {gigabytes:.2f} GB in this process")

    def load(self, index: int) -> tuple[Tensor, dict]:
        image = self.files.decode(index, self._encoded.get(index) or self.files.read(index))
        size = height, width = tuple(image.shape[1:])
        rows = slice(self._packed.first[index], self._packed.first[index + 1])
        corners = torch.from_numpy(self._packed.boxes[rows].copy())
        corners[:, 2:] += corners[:, :2]
        corners[:, 0::2].clamp_(min=0, max=width)
        corners[:, 1::2].clamp_(min=0, max=height)
        labels = torch.from_numpy(self._packed.labels[rows].copy())
        sample = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
            "labels": labels,
            "area": torch.from_numpy(self._packed.areas[rows].copy()),
            "iscrowd": torch.zeros_like(labels),
            "image_id": self.image_ids[index],
            "orig_size": size,
        }
        if self._packed.masks is not None:
            masks = self._packed.masks.decode(range(rows.start, rows.stop), height, width)
            sample["masks"] = tv_tensors.Mask(masks)
        return image, keep_objects(sample, has_area(corners))

    def ground_truth(self) -> dict:
        """Return the mended annotations. Read anew: keeping them would cost gigabytes on COCO's training set."""
        data = read_coco(self.path, self.flags[1])
        mend_coco(data, self.path)
        return data


def build_coco(image_set: str, args: argparse.Namespace, *, transforms: nn.Module) -> CocoDetection:
    """Return the `train` or `val` set of `--coco_path`, or the one that `--{train,val}_images` and `_json` name."""
    images, annotations, flags = coco_files(image_set, args)
    return CocoDetection(
        images,
        annotations,
        transforms=transforms,
        seed=args.seed,
        category_ids=args.category_ids,
        num_classes=args.num_classes,
        masks_for=MASKS_FOR_PASTING if args.copy_paste and image_set == "train" else "",
        flags=flags,
    )


def coco_files(image_set: str, args: argparse.Namespace) -> tuple[Path, Path, tuple[str, str]]:
    """Return the image folder and the annotation file of the `train` or `val` set, and the flags that named them.

    Raises:
        UserError: `--coco_path` is needed and is no folder.
    """
    part = "train" if args.eval_in_training_set else image_set
    images, annotations = getattr(args, f"{part}_images"), getattr(args, f"{part}_json")
    flags = (f"--{part}_images", f"--{part}_json")
    if annotations:
        return Path(images), Path(annotations), flags
    root = Path(args.coco_path)
    if not root.is_dir():
        raise UserError(
            f"--coco_path {root} is not a folder; it must hold train2017/, val2017/ and annotations/. For any "
            f"other layout give {flags[0]} FOLDER and {flags[1]} FILE; --dataset_file synthetic needs no files"
        )
    return root / f"{part}2017", root / "annotations" / f"instances_{part}2017.json", ("--coco_path", "--coco_path")
