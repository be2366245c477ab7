"""Objects of one training image pasted into another (Simple Copy-Paste, arXiv 2012.07177, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from datasets.transforms import keep_objects


def boxes_from_masks(sample: dict) -> dict:
    """Return the sample with boxes around what is left of the masks; objects of which nothing is left drop out.

    A box reaches from the first pixel's left and upper edge to the last one's right and lower edge, in pixels, xyxy.
    `area` becomes the number of pixels.
    """
    sample = keep_objects(sample, sample["masks"].as_subclass(Tensor).flatten(1).bool().any(dim=1))
    masks = sample["masks"].as_subclass(Tensor)
    boxes = sample["boxes"].as_subclass(Tensor).new_zeros(len(masks), 4)
    if len(masks):  # masks_to_boxes gives the numbers of the first and the last pixel
        boxes = masks_to_boxes(masks).to(boxes) + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    area = masks.flatten(1).sum(dim=1).to(sample["area"])
    return sample | {"boxes": tv_tensors.wrap(boxes, like=sample["boxes"]), "area": area}


class CopyPaste:
    """Paste a random part of the objects of another image: any number from none to all of them, at most `most`.

    Both images have been augmented and have the same size. What is pasted hides what was there: masks lose the hidden
    pixels, boxes shrink to what is left, and hidden objects drop out. There is no blending (the paper found no gain).

    Args:
        most: largest number of objects that are pasted.
        keep_masks: leave `masks` in the result.
    """

    def __init__(self, most: int, *, keep_masks: bool = False) -> None:
        self.most, self.keep_masks = most, keep_masks

    def __call__(self, image: Tensor, sample: dict, source: Tensor, other: dict) -> tuple[Tensor, dict]:
        """Return the image (3, h, w) uint8 and its sample; `source` and `other` are the second image and its sample.

        Raises:
            ValueError: the images differ in size.
        """
        if image.shape != source.shape:
            raise ValueError(f"images of {tuple(image.shape)} and {tuple(source.shape)}: only equal sizes can be mixed")
        # Of tiny objects scaling may leave no pixel: there is nothing to paste.
        other = keep_objects(other, other["masks"].as_subclass(Tensor).flatten(1).bool().any(dim=1))
        objects = len(other["boxes"])
        number = int(torch.randint(min(objects, self.most) + 1, ()))
        if number:
            image, sample = self._paste(image, sample, source, other, torch.randperm(objects)[:number])
        if not self.keep_masks:
            sample = {key: value for key, value in sample.items() if key != "masks"}
        return image, sample

    @staticmethod
    def _paste(image: Tensor, sample: dict, source: Tensor, other: dict, chosen: Tensor) -> tuple[Tensor, dict]:
        mine, pasted = sample["masks"].as_subclass(Tensor), other["masks"].as_subclass(Tensor)[chosen]
        cover = pasted.bool().any(dim=0)  # any() of uint8 is uint8
        hidden = (mine.bool() & cover).flatten(1).any(dim=1)
        rest = sample | {"masks": tv_tensors.wrap(mine * ~cover, like=sample["masks"])}
        # Boxes of objects that nothing hides stay as they were annotated.
        parts = [keep_objects(sample, ~hidden), boxes_from_masks(keep_objects(rest, hidden))]
        chosen_objects = torch.zeros(len(other["boxes"]), dtype=torch.bool).index_fill(0, chosen, True)
        parts.append(keep_objects(other, chosen_objects))
        return torch.where(cover, source, image), _joined(parts)


def _joined(parts: list[dict]) -> dict:
    """Return one sample with the objects of all; everything else is that of the first."""
    joined = dict(parts[0])
    for key in ("boxes", "labels", "area", "iscrowd", "masks"):
        rows = torch.cat([part[key].as_subclass(Tensor) for part in parts])
        joined[key] = tv_tensors.wrap(rows, like=parts[0][key])
    return joined
