"""The border between data sets and model: samples become `(ImageBatch, list[Target])`."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert

from util.errors import UserError
from util.structures import ImageBatch, Target


def collate(samples: list[tuple[Tensor, dict]]) -> tuple[ImageBatch, list[Target]]:
    """Pad images (3, h, w) to one canvas and turn xyxy pixels into cxcywh relative to the *unpadded* image.

    Raises:
        UserError: a box that is not finite or has no area, or a crowd region; names the image id.
    """
    images = [image for image, _ in samples]
    return pad_images(images), [make_target(sample, tuple(image.shape[-2:])) for image, sample in samples]


def pad_images(images: list[Tensor]) -> ImageBatch:
    """Put images (3, h, w) into the top-left corners of one zero canvas, as large as the largest height and width."""
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    canvas = (max(h for h, _ in sizes), max(w for _, w in sizes))
    # The colours of a pixel lie side by side, as decoding and resizing leave them: anything else is slow to copy.
    pixels = images[0].new_zeros(len(images), *canvas, images[0].shape[0]).permute(0, 3, 1, 2)
    padding = torch.ones(len(images), *canvas, dtype=torch.bool)
    for i, (image, (h, w)) in enumerate(zip(images, sizes)):
        pixels[i, :, :h, :w] = image
        padding[i, :h, :w] = False
    return ImageBatch(pixels, padding, sizes)


def make_target(sample: dict, size: tuple[int, int]) -> Target:
    """Return the target of one transformed sample whose image has `size` (h, w) in pixels."""
    image_id = int(sample["image_id"])
    boxes = sample["boxes"].as_subclass(Tensor).float()
    bad = ~torch.isfinite(boxes).all(dim=1) | (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
    if bad.any():
        raise UserError(
            f"image id {image_id}: box {boxes[bad][0].tolist()} (xyxy in pixels of the augmented image, {size[1]} x "
            f"{size[0]}) must be finite with a positive width and height; check this image's annotations and transforms"
        )
    iscrowd = sample["iscrowd"].bool()
    if iscrowd.any():
        raise UserError(f"image id {image_id}: a crowd region is among the targets; the data set must leave it out")
    scale = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    masks = sample.get("masks")
    return Target(
        labels=sample["labels"],
        boxes=box_convert(boxes, "xyxy", "cxcywh") / scale,
        image_id=image_id,
        orig_size=tuple(sample["orig_size"]),
        size=size,
        area=sample["area"],
        iscrowd=iscrowd,
        masks=None if masks is None else masks.as_subclass(Tensor),
    )
