"""Image files in place of a data set: `--analyse attention --attention_images FILE...`."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

import ops
from datasets import build_transforms
from datasets.base import DetectionDataset
from datasets.decode import decode_rgb
from util import dist
from util.checkpoint import load_weights, read_checkpoint, stored_class_names
from util.environment import prepare_output_dir, write_run_files
from util.errors import UserError
from util.stored_flags import with_flags_of


class ImageFiles(DetectionDataset):
    """Images without annotations; their ids count from 0.

    Args:
        paths: of the files.
        class_names: of the model.
        transforms: of evaluation.

    Raises:
        UserError: a file does not exist.
    """

    def __init__(self, paths: Sequence[Path], class_names: Sequence[str], *, transforms: nn.Module) -> None:
        super().__init__(transforms=transforms)
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(f"--attention_images: {missing[0]} is not a file; give images, a shell expands DIR/*.jpg")
        self.paths = list(paths)
        self.image_ids = list(range(len(paths)))
        self.class_names = list(class_names)
        self.category_ids = list(range(len(class_names)))

    def load(self, index: int) -> tuple[Tensor, dict]:
        path = self.paths[index]
        try:
            image = decode_rgb(path.read_bytes())
        except Exception as error:  # whatever PIL raises
            raise UserError(f"--attention_images: {path} cannot be read as an image ({error})") from error
        size = tuple(image.shape[1:])
        none = torch.zeros(0, dtype=torch.int64)
        sample = {
            "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
            "labels": none,
            "area": torch.zeros(0),
            "iscrowd": none,
            "image_id": self.image_ids[index],
            "orig_size": size,
        }
        return image, sample

    def ground_truth(self) -> dict:
        return {"images": [{"id": i} for i in self.image_ids], "annotations": [], "categories": []}

    def picture_name(self, index: int) -> str:
        """Return how files about an image begin: its own name, numbered where several have the same."""
        stems = [path.stem for path in self.paths]
        stem = stems[index]
        return stem if Counter(stems)[stem] == 1 else f"{stem}_{index + 1}"


def attention_of_files(args: Namespace) -> None:
    """Draw the attention of `--resume` over the files of `--attention_images`.

    Raises:
        UserError: a file is missing or no image, or the weights do not fit.
    """
    from models import build_model
    from util.analysis.attention_pictures import attention_options, draw_attention

    folder = prepare_output_dir(args.output_dir)
    if args.resume == "auto":
        args.resume = str(folder / "checkpoint.pth")
    content = read_checkpoint(args.resume)
    args = with_flags_of(args, args.given_flags, content, args.resume)
    names = stored_class_names(content)
    if args.num_classes is None:
        if names is None:
            raise UserError(f"{args.resume} does not say its class names: give --num_classes")
        args.num_classes = len(names)
    if names is None or len(names) != args.num_classes:
        names = [f"class {i}" for i in range(args.num_classes)]
    files = ImageFiles([Path(f) for f in args.attention_images], names, transforms=build_transforms("val", args))
    try:
        ops.set_backend(args.ops_backend)
    except ValueError as error:
        raise UserError(f"--ops_backend {args.ops_backend}: {error}") from error
    device = dist.init_distributed_mode(args.device, args.local_rank, args.dist_timeout)
    if dist.is_distributed():
        raise UserError("--analyse runs in one process: start it without a launcher")
    no_download = "checkpoint" if args.backbone_weights != "none" else "none"
    model = build_model(Namespace(**{**vars(args), "backbone_weights": no_download}))[0].to(device)
    for line in load_weights(model, content, name=args.resume).lines:
        dist.info(f"{args.resume}: {line}")
    write_run_files(args, folder)
    for path in draw_attention(model, files, attention_options(args), device, folder / "attention"):
        dist.info(f"wrote {path}")
