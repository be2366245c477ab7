"""A trained detector in three lines of Python.

    from util.infer import load
    predictor = load("checkpoint.pth")
    found = predictor("street.jpg")          # found.boxes, found.scores, found.names

Pixels, model and selection are those of `main.py --eval`: an image gives the same detections here and there.
"""

from __future__ import annotations

import difflib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_pil_image

from datasets import build_transforms
from datasets.coco_names import COCO_NAMES
from datasets.collate import pad_images
from datasets.decode import decode_rgb, rgb_tensor
from models import build_postprocessor
from util import dist, structures
from util.checkpoint import native_weights, read_checkpoint, stored_class_names
from util.engine import StepSettings
from util.errors import UserError
from util.stored_flags import build_trained, flags_of
from util.visualize import Annotation, category_colors, draw_annotations

SHOWN_NAMES = 100  # class names in a message
ImageLike = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first. Tensors are on the CPU."""

    boxes: Tensor  # (N, 4) float32 xyxy, pixels of the image as given
    scores: Tensor  # (N,) float32
    labels: Tensor  # (N,) int64, class index of the model
    names: list[str]  # class name of each
    category_ids: list[int]  # of each, as in the annotation file of the training
    size: tuple[int, int]  # (h, w) of the image
    masks: Tensor | None = None  # (N, h, w) bool, of models that predict masks

    def __len__(self) -> int:
        return len(self.names)


class Prepared(NamedTuple):
    """An image on its way to the model."""

    pixels: Tensor  # (3, h, w) uint8 in the size of the evaluation
    covered: tuple[float, float]  # (h, w) that predicted boxes are relative to, in pixels of the image as given
    size: tuple[int, int]  # (h, w) of the image as given


class Preparation:
    """The transform of evaluation for images without annotations; knows no model, so loader processes can have it."""

    def __init__(self, transforms: nn.Module) -> None:
        self.transforms = transforms

    def __call__(self, image: ImageLike) -> Prepared:
        """Return `image` as the model wants it; see `read_image` for what it may be."""
        pixels = read_image(image)
        size = height, width = (int(pixels.shape[1]), int(pixels.shape[2]))
        nothing = torch.zeros(0, dtype=torch.int64)
        sample = {
            "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
            "labels": nothing,
            "area": torch.zeros(0),
            "iscrowd": nothing,
            "image_id": 0,
            "orig_size": (height, width),
        }
        pixels, sample = self.transforms(pixels, sample)
        return Prepared(pixels, tuple(sample["orig_size"]), size)


class Predictor:
    """A detector with all that is needed around it. Made by `load`.

    Attributes:
        model: the detector, in evaluation mode.
        transform: image -> `Prepared`.
        class_names: by class index; "N/A" where no category uses the index.
        category_ids: by class index; -1 where no category uses it.

    Args:
        score_threshold: detections with a lower score are left out.
        class_thresholds: other thresholds, by class name.
        classes: names of the classes that are reported; None: all.
        amp: off, fp16 or bf16.

    Raises:
        UserError: a name that is no class of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Preparation,
        postprocessor: nn.Module,
        *,
        class_names: Sequence[str],
        category_ids: Sequence[int],
        device: torch.device,
        score_threshold: float = 0.3,
        class_thresholds: Mapping[str, float] | None = None,
        classes: Sequence[str] | None = None,
        amp: str = "off",
    ) -> None:
        self.model = model.to(device).eval()
        self.transform, self.postprocessor, self.device = transform, postprocessor, device
        self.class_names, self.category_ids = list(class_names), list(category_ids)
        self.colors = category_colors(i for i in category_ids if i >= 0)
        self._settings = StepSettings(amp=amp)
        self._least = self._lowest_scores(score_threshold, class_thresholds or {}, classes)

    def __call__(self, images: ImageLike | Sequence[ImageLike], batch_size: int = 1) -> Any:
        """Return the `Detections` of an image, or a list of them for a list of images.

        Args:
            images: paths, PIL images, uint8 arrays (h, w, 3) RGB or (h, w), or uint8 tensors (3, h, w) or (1, h, w).
                Images are not turned by an EXIF tag, as in training.
            batch_size: images at once. Smaller images of a batch are padded, which changes their scores a little.

        Raises:
            UserError: a file that cannot be read; names it.
        """
        if not isinstance(images, (list, tuple)):
            return self.detect([self.transform(images)])[0]
        found = []
        for start in range(0, len(images), batch_size):
            found += self.detect([self.transform(image) for image in images[start : start + batch_size]])
        return found

    @torch.no_grad()
    def detect(self, prepared: Sequence[Prepared]) -> list[Detections]:
        """Return the detections of images that `transform` has prepared, all in one batch."""
        batch = pad_images([image.pixels for image in prepared]).to(self.device, non_blocking=True)
        with self._settings.autocast(self.device):
            output = self.model(batch, None)
        found = self.postprocessor(output, [image.covered for image in prepared], range(len(prepared)))
        return [self._selected(one.to("cpu"), image.size) for one, image in zip(found, prepared)]

    def draw(self, image: ImageLike, found: Detections) -> Image.Image:
        """Return a picture of the image with the boxes in it; see `util.visualize.draw_annotations` for its size."""
        rows = zip(found.boxes, found.names, found.scores.tolist(), found.category_ids)
        marks = [Annotation(box, f"{name} {score:.2f}", self.colors[category]) for box, name, score, category in rows]
        return draw_annotations(to_pil_image(read_image(image)), marks[::-1])

    def categories(self) -> list[dict[str, Any]]:
        """Return the classes as COCO-format files list them."""
        return [{"id": i, "name": name} for i, name in zip(self.category_ids, self.class_names) if i >= 0]

    def _lowest_scores(self, general: float, named: Mapping[str, float], classes: Sequence[str] | None) -> Tensor:
        """Return the lowest score (C,) of a detection of each class; infinite for classes that are not reported."""
        known = {name for name, category in zip(self.class_names, self.category_ids) if category >= 0}
        for name in [*named, *(classes or ())]:
            if name not in known:
                raise UserError(unknown_class(name, [n for n in self.class_names if n in known]))
        reported = known if classes is None else set(classes)
        hidden = float("inf")
        rows = zip(self.class_names, self.category_ids)
        return torch.tensor([named.get(n, general) if n in reported and i >= 0 else hidden for n, i in rows])

    def _selected(self, found: structures.Detections, size: tuple[int, int]) -> Detections:
        """Return the detections that are reported."""
        scores, boxes = found.scores.float(), found.boxes_px.float()
        kept = (scores >= self._least[found.labels]) & boxes.isfinite().all(dim=1)
        labels = found.labels[kept]
        return Detections(
            boxes=boxes[kept],
            scores=scores[kept],
            labels=labels,
            names=[self.class_names[label] for label in labels.tolist()],
            category_ids=[self.category_ids[label] for label in labels.tolist()],
            size=size,
            masks=None if found.masks is None else found.masks[kept],
        )


def load(
    checkpoint: str | Path,
    device: str | torch.device = "auto",
    *,
    score_threshold: float = 0.3,
    class_thresholds: Mapping[str, float] | None = None,
    topk: int | None = None,
    nms_iou: float | None = None,
    classes: Sequence[str] | None = None,
    test_size: int | None = None,
    max_size: int | None = None,
    averaged: bool = False,
    amp: str = "off",
    args: Namespace | None = None,
) -> Predictor:
    """Return the detector of a checkpoint, ready for images.

    Args:
        checkpoint: our file, a published one that holds its arguments, or its https address.
        device: auto (a GPU if there is one), cuda, cuda:N, cpu or mps.
        score_threshold, class_thresholds, classes, amp: see `Predictor`.
        topk: most detections of an image; None: as in training (100 if nothing else was said), like all that follows.
        nms_iou: IoU above which NMS drops a detection; 0: no NMS.
        test_size, max_size: shorter and longest side of an image in pixels; test_size 0: no resizing.
        averaged: take the averaged weights (`--use_ema`).
        args: flags of the model, of `main.get_args_parser()`, for a file that holds none.

    Raises:
        UserError: a file that cannot be read, or says too little; classes that the model does not have.
    """
    content = read_checkpoint(checkpoint)
    flags = args or model_flags(content, str(checkpoint))
    given = {"topk": topk, "nms_iou": nms_iou, "test_size": test_size, "max_size": max_size}
    return build_predictor(
        content,
        str(checkpoint),
        with_given(flags, {name: value for name, value in given.items() if value is not None}),
        dist.pick_device(str(device)),
        averaged=averaged,
        score_threshold=score_threshold,
        class_thresholds=class_thresholds,
        classes=classes,
        amp=amp,
    )


def model_flags(content: Mapping[str, Any], name: str) -> Namespace:
    """Return the flags that the checkpoint `name` says; UserError if it says too little to build its model."""
    flags = flags_of(content, native_weights(content, name))
    if flags is None:
        raise UserError(
            f"checkpoint {name} does not say how its model is built. Give the flags of the model: python main.py "
            f"[flags of its preset in configs/] --infer PATH --resume {name} --output_dir FOLDER, in Python "
            "load(..., args=main.get_args_parser().parse_args([...]))"
        )
    return flags


def with_given(flags: Namespace, given: Mapping[str, Any]) -> Namespace:
    """Return `flags` with those of `given` in their places; of the two kinds of NMS the one that is given."""
    changed = Namespace(**{**vars(flags), **given})
    if given.get("nms_iou") and "soft_nms_iou" not in given:
        changed.soft_nms_iou = 0.0
    if given.get("soft_nms_iou") and "nms_iou" not in given:
        changed.nms_iou = 0.0
    return changed


def build_predictor(
    content: Mapping[str, Any],
    name: str,
    flags: Namespace,
    device: torch.device,
    *,
    averaged: bool = False,
    **options: Any,
) -> Predictor:
    """Return the predictor of a checkpoint and the flags of its model.

    Args:
        content: of the checkpoint `name`.
        averaged: take the averaged weights.
        options: of `Predictor`.

    Raises:
        UserError: the weights do not fit, or there are no averaged ones.
    """
    model, flags, _ = build_trained(content, name, flags, averaged=averaged)
    names, ids = _classes(content, flags.num_classes)
    return Predictor(
        model,
        Preparation(build_transforms("val", flags)),
        build_postprocessor(flags),
        class_names=names,
        category_ids=ids,
        device=device,
        **options,
    )


def _classes(content: Mapping[str, Any], count: int) -> tuple[list[str], list[int]]:
    """Return names and category ids by class index; what the file does not say is COCO's, or else numbers from 0."""
    names, ids = stored_class_names(content), content.get("category_ids")
    coco = [[i if i in COCO_NAMES else -1 for i in range(91)], sorted(COCO_NAMES)]
    if ids is None:
        ids = next((c for c in coco if len(c) == count and (names is None or names == _coco_names(c))), range(count))
    if names is None:
        names = _coco_names(ids) if list(ids) in coco else [f"class {i}" for i in ids]
    return _filled(names, count, "N/A"), _filled(ids, count, -1)


def _filled(values: Sequence[Any], count: int, nothing: Any) -> list[Any]:
    """Return the first `count` values; `nothing` where there are fewer."""
    return (list(values) + [nothing] * count)[:count]


def _coco_names(ids: Sequence[int]) -> list[str]:
    return [COCO_NAMES.get(i, "N/A") for i in ids]


def read_image(image: ImageLike) -> Tensor:
    """Return an image as uint8 RGB (3, h, w).

    Args:
        image: path, PIL image, uint8 array (h, w, 3) RGB or (h, w), uint8 tensor (3, h, w) or (1, h, w).

    Raises:
        UserError: a file that cannot be read; names it.
        ValueError: an array or tensor of another shape or type.
    """
    if isinstance(image, (str, Path)):
        try:
            pixels = decode_rgb(Path(image).read_bytes())
        except Exception as error:  # a decoder may raise anything over a broken file
            raise UserError(f"image {image} cannot be read: {_reason(error)}") from error
        return pixels
    if isinstance(image, Image.Image):
        return rgb_tensor(image)
    pixels = torch.from_numpy(np.array(image)) if isinstance(image, np.ndarray) else image
    if not isinstance(pixels, Tensor):
        raise ValueError(f"an image is a path, a PIL image, an array or a tensor, not a {type(image).__name__}")
    if isinstance(image, np.ndarray):
        pixels = pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"an image has uint8 pixels in an array (h, w, 3) or a tensor (3, h, w), got {pixels.dtype} in "
            f"{tuple(image.shape)}"
        )
    return pixels.expand(3, -1, -1).cpu()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "empty, or no image of a known kind"
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return getattr(error, "strerror", None) or first_line


def unknown_class(name: str, names: Sequence[str]) -> str:
    """Return the message about a class name that the model does not have."""
    lower = {n.lower(): n for n in names}
    close = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=3)]
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    more = f", and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"the model has no class {name!r}{hint}. Its classes: {', '.join(names[:SHOWN_NAMES])}{more}"
