"""Pictures of detections, alone or beside the ground truth, for looking at what a detector does."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from util.boxes import cxcywh_to_xyxy
from util.pixels import denormalize
from util.structures import Detections, ImageBatch, Target

# Small images are enlarged until their shorter side has SHORTEST pixels, so that labels can be read on them; large ones
# are reduced until their longer side has LONGEST, so that camera pictures do not fill the disk.
SHORTEST, LONGEST = 384, 1280
# In the contact sheet every image fits a square of this side. Boxes and labels are drawn anew: reduced, text is lost.
CELL = 472
FONT_SIZE = 15
GAP = 8
INK, PAPER = (20, 20, 20), (250, 250, 250)
COLUMNS = 2


class Annotation(NamedTuple):
    """One box to draw."""

    box: Tensor  # (4,) xyxy in pixels of the original file
    text: str
    color: tuple[int, int, int]


def draw_detections(
    dataset: Any, detections: Sequence[Detections], folder: Path, *, limit: int = 8, score_threshold: float = 0.3
) -> list[Path]:
    """Write one PNG per image, ground truth left and detections right, and a contact sheet of all of them.

    Args:
        dataset: offers `image_ids`, `class_names` and `category_ids` (both by model label), `load_image(index)` and
            `coco` (pycocotools ground truth), as `datasets.base.DetectionDataset` does.
        detections: one entry per image, found by its `image_id`; boxes in pixels of the original file.
        folder: where the files go; it is made. Pictures of an earlier call with the same names are replaced.
        limit: the first so many entries are drawn.
        score_threshold: detections with a lower score are left out.

    Returns:
        the files, in the order of `detections`, and last `overview.png`; nothing if there is nothing to draw.

    Raises:
        ValueError: an image id that is not in the data set.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index_of = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    colors = category_colors(dataset.coco.getCatIds())
    paths, cells = [], []
    for found in detections[:limit]:
        if found.image_id not in index_of:
            raise ValueError(f"image id {found.image_id} of the detections is not in the data set: draw its own images")
        image = dataset.load_image(index_of[found.image_id]).convert("RGB")
        truth = _truth(dataset, found.image_id, colors)
        shown = _shown(dataset, found, score_threshold, colors)
        titles = (
            f"image {found.image_id}, ground truth: {_count(truth, 'object')}",
            f"{_count(shown, 'detection')}, score >= {score_threshold:g}",
        )
        paths.append(folder / f"image_{found.image_id}.png")
        _page(image, (truth, shown), titles, _reading_scale(image.size)).save(paths[-1])
        cells.append(_page(image, (truth, shown), titles, CELL / max(image.size)))
    if cells:
        paths.append(folder / "overview.png")
        _contact_sheet(cells).save(paths[-1])
    return paths


def draw_annotations(image: Image.Image, annotations: Sequence[Annotation], scale: float | None = None) -> Image.Image:
    """Return a picture of the image with boxes and labels, the last one on top.

    Args:
        image: RGB; it stays as it is.
        annotations: boxes in pixels of the image.
        scale: size of the picture over that of the image; None: enlarged or reduced so that labels can be read.
    """
    scale = _reading_scale(image.size) if scale is None else scale
    size = tuple(max(round(side * scale), 1) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    if annotations:
        boxes = _inside(torch.stack([a.box for a in annotations]).float() * scale, size)
        pixels = draw_bounding_boxes(pil_to_tensor(image), boxes, colors=[a.color for a in annotations], width=2)
        image = to_pil_image(pixels)
        for annotation, box in zip(annotations, boxes.tolist()):
            _write_label(image, annotation, box)
    return image


def category_colors(category_ids: Iterable[int]) -> dict[int, tuple[int, int, int]]:
    """Return the colour of every category; it depends on the place of the id among all of them."""
    return {category: _color(rank) for rank, category in enumerate(sorted(category_ids))}


def draw_batch(
    images: ImageBatch, columns: Sequence[tuple[Sequence[str], Sequence[Sequence[Annotation]]]], path: Path
) -> Path:
    """Write a contact sheet of the images as the model sees them, every image once for each of `columns`.

    Args:
        images: B images.
        columns: (title of every image, annotations of every image), boxes in pixels of the image in the batch.
        path: of the PNG.
    """
    cells = []
    for number, (h, w) in enumerate(images.sizes):
        pixels = images.pixels[number, :, :h, :w].cpu()
        image = to_pil_image(denormalize(pixels) if pixels.is_floating_point() else pixels)
        titles = tuple(titles[number] for titles, _ in columns)
        cells.append(_page(image, tuple(boxes[number] for _, boxes in columns), titles, CELL / max(image.size)))
    _contact_sheet(cells, columns=max(2 * COLUMNS // len(columns), 1)).save(path)
    return path


def of_target(target: Target, class_names: Sequence[str]) -> list[Annotation]:
    """Return what there is to draw of a target on its image in the batch."""
    boxes = cxcywh_to_xyxy(target.boxes.cpu().float()) * _sides(target.size)
    labels = target.labels.tolist()
    return [Annotation(box, class_names[label], _color(label)) for box, label in zip(boxes, labels)]


def of_detections(
    found: Detections, target: Target, class_names: Sequence[str], score_threshold: float
) -> list[Annotation]:
    """Return what there is to draw of the detections of the image of `target`, the best one last."""
    boxes = found.boxes_px.detach().cpu().float() / _sides(target.orig_size) * _sides(target.size)
    rows = zip(found.scores.tolist(), found.labels.tolist(), boxes)
    shown = [row for row in rows if row[0] >= score_threshold and row[2].isfinite().all()]
    return [Annotation(box, f"{class_names[label]} {score:.2f}", _color(label)) for score, label, box in shown[::-1]]


def _sides(size: tuple[float, float]) -> Tensor:
    """Return (w, h, w, h) of (h, w)."""
    return torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)


def _truth(dataset: Any, image_id: int, colors: dict[int, tuple[int, int, int]]) -> list[Annotation]:
    """Return the annotated boxes of one image, crowd regions included and marked."""
    annotations = []
    for entry in dataset.coco.imgToAnns[image_id]:
        x, y, width, height = entry["bbox"]
        category = entry["category_id"]
        name = dataset.coco.cats[category]["name"] + (" (crowd)" if entry.get("iscrowd") else "")
        annotations.append(Annotation(torch.tensor([x, y, x + width, y + height]), name, colors[category]))
    return annotations


def _shown(
    dataset: Any, found: Detections, score_threshold: float, colors: dict[int, tuple[int, int, int]]
) -> list[Annotation]:
    """Return the detections to draw, the best one last, that is on top."""
    annotations = []
    for score, label, box in zip(found.scores.tolist(), found.labels.tolist(), found.boxes_px.detach().cpu()):
        if score >= score_threshold and box.isfinite().all():
            # A label that no category uses can still be predicted (91-slot heads); it is drawn in grey.
            color = colors.get(dataset.category_ids[label], (128, 128, 128))
            annotations.append(Annotation(box, f"{dataset.class_names[label]} {score:.2f}", color))
    return annotations[::-1]


def _reading_scale(size: tuple[int, int]) -> float:
    """Return the factor at which an image of `size` pixels is drawn in its own file."""
    return min(max(SHORTEST / min(size), 1.0), LONGEST / max(size))


def _page(
    image: Image.Image, parts: tuple[Sequence[Annotation], ...], titles: tuple[str, ...], scale: float
) -> Image.Image:
    """Return the image once for each of `parts`, side by side."""
    panels = [_panel(image, annotations, title, scale) for annotations, title in zip(parts, titles)]
    return _in_a_row(panels, GAP)


def _panel(image: Image.Image, annotations: Sequence[Annotation], title: str, scale: float) -> Image.Image:
    """Return the image at `scale` with boxes, labels and a title above it."""
    image = draw_annotations(image, annotations, scale)
    font = ImageFont.load_default(FONT_SIZE)
    width = max(image.width, round(font.getlength(title)) + 2 * GAP)
    panel = Image.new("RGB", (width, image.height + FONT_SIZE + GAP), PAPER)
    ImageDraw.Draw(panel).text((GAP // 2, GAP // 4), title, fill=INK, font=font)
    panel.paste(image, (0, FONT_SIZE + GAP))
    return panel


def _inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return xyxy boxes (N, 4) clipped to the picture, with corners in order."""
    width, height = size
    low, high = torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])
    limit = torch.tensor([width - 1.0, height - 1.0])
    return torch.cat([low.clamp(min=0).minimum(limit), high.clamp(min=0).minimum(limit)], dim=1)


def _write_label(image: Image.Image, annotation: Annotation, box: Sequence[float]) -> None:
    """Write a label on its colour: above the box, or inside it where there is no room above.

    torchvision's own labels are ten pixels high without a font file, and in the oldest supported version transparent.
    """
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(FONT_SIZE)
    left, top, right, bottom = font.getbbox(annotation.text)
    width, height = right - left + 6, bottom - top + 5
    x = max(min(box[0], image.width - width), 0)
    y = box[1] - height if box[1] >= height else box[1]
    draw.rectangle((x, y, x + width, y + height), fill=annotation.color)
    draw.text((x + 3 - left, y + 3 - top), annotation.text, fill=_ink_on(annotation.color), font=font)


def _ink_on(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever is read more easily on `color` (luma of ITU-R BT.601)."""
    red, green, blue = color
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER


def _color(rank: int) -> tuple[int, int, int]:
    """Return the colour of a category: hues a golden ratio apart, so that any first few differ well."""
    hue = (rank * 0.61803398875) % 1.0
    value = (1.0, 0.75)[rank // 8 % 2]
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.85, value))


def _count(annotations: Sequence[Annotation], noun: str) -> str:
    return f"{len(annotations)} {noun}{'' if len(annotations) == 1 else 's'}"


def _in_a_row(images: Sequence[Image.Image], gap: int) -> Image.Image:
    row = Image.new("RGB", (sum(i.width + gap for i in images) - gap, max(i.height for i in images)), PAPER)
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


def _contact_sheet(cells: Sequence[Image.Image], columns: int = COLUMNS) -> Image.Image:
    """Return all cells in columns, rows as high as they need to be."""
    rows = [_in_a_row(cells[i : i + columns], 3 * GAP) for i in range(0, len(cells), columns)]
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height + 2 * GAP for r in rows) - 2 * GAP), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 2 * GAP
    return sheet
