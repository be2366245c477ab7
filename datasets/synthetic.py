"""Coloured shapes on textured backgrounds: a detection task that needs no download.

Every image is a function of (split, index): nothing is stored, no two splits share an image, no other seed matters.
The class of an object is its shape (and above 12 classes its colour too). Larger objects are drawn first, so that a
small one is never hidden behind a large one; boxes and masks cover the pixels that stay visible.
"""

from __future__ import annotations

import argparse
import colorsys
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision import tv_tensors

from datasets.base import DetectionDataset
from util.errors import UserError

Polygon = tuple[tuple[float, float], ...]  # corners in any unit; a shape is its outline, then its holes

SPLITS = {"train": 0, "val": 1}
HUES = {"red": 0.0, "green": 0.33, "blue": 0.63, "yellow": 0.16}  # colour groups, once shapes run out
PLACING_TRIES = 40
LEAST_VISIBLE = 0.25  # share of an object that later ones must leave visible


@dataclass(frozen=True)
class Scene:
    """What an image may hold; the fields are the `--synthetic_*` flags."""

    size: tuple[int, int] = (128, 128)  # (h, w) in pixels
    classes: int = 6
    objects: tuple[int, int] = (1, 5)  # fewest and most
    object_size: tuple[float, float] = (0.15, 0.4)  # longer side, as a share of the shorter image side
    overlap: float = 0.2  # largest IoU of two boxes when objects are placed
    texture: float = 0.3  # strength of the background, 0..1

    def __post_init__(self) -> None:
        most = len(SHAPES) * len(HUES)
        rules = [
            (min(self.size) < 16, f"--synthetic_size {self.size}: at least 16 pixels"),
            (not 1 <= self.classes <= most, f"--synthetic_classes {self.classes}: 1 to {most}"),
            (not 0 <= self.objects[0] <= self.objects[1], f"--synthetic_objects {self.objects}: fewest, then most"),
            (
                not 0 < self.object_size[0] <= self.object_size[1] <= 1,
                f"--synthetic_object_size {self.object_size}: smallest, then largest, in (0, 1]",
            ),
            (not 0 <= self.overlap <= 1, f"--synthetic_overlap {self.overlap}: 0 to 1"),
            (not 0 <= self.texture <= 1, f"--synthetic_texture {self.texture}: 0 to 1"),
        ]
        wrong = [message for broken, message in rules if broken]
        if wrong:
            raise UserError("; ".join(wrong))


def _regular(corners: int, turn: float = 0.0, radius: float = 1.0) -> Polygon:
    """Return a regular polygon around the origin; its first corner points up."""
    angles = [2 * math.pi * i / corners + turn for i in range(corners)]
    return tuple((radius * math.sin(a), -radius * math.cos(a)) for a in angles)


def _star(points: int, inner: float) -> Polygon:
    outer, inside = _regular(points), _regular(points, turn=math.pi / points, radius=inner)
    return tuple(corner for pair in zip(outer, inside) for corner in pair)


def _on_grid(text: str) -> Polygon:
    """Return the polygon whose corners are the digit pairs (x, y) of `text`."""
    return tuple((float(pair[0]), float(pair[1])) for pair in text.split())


def _crescent() -> Polygon:
    """Return an arc of three quarters of a circle, closed by the arc of a second circle moved right."""
    outside = [(math.cos(a), math.sin(a)) for a in np.linspace(0.25 * math.pi, 1.75 * math.pi, 20)]
    inside = [(0.45 + 0.75 * math.cos(a), 0.75 * math.sin(a)) for a in np.linspace(1.6 * math.pi, 0.4 * math.pi, 16)]
    return tuple(outside + inside)


SHAPES: dict[str, tuple[Polygon, ...]] = {
    "circle": (_regular(32),),
    "square": (_regular(4, turn=math.pi / 4),),
    "triangle": (_regular(3),),
    "star": (_star(5, 0.42),),
    "cross": (_on_grid("10 20 21 31 32 22 23 13 12 02 01 11"),),
    "ring": (_regular(32), _regular(32, radius=0.55)),
    "diamond": (((0, -1), (0.62, 0), (0, 1), (-0.62, 0)),),
    "arrow": (_on_grid("20 42 32 34 14 12 02"),),
    "crescent": (_crescent(),),
    "hourglass": (_on_grid("00 40 32 44 04 12"),),
    "ell": (_on_grid("00 10 12 32 33 03"),),
    "frame": (_on_grid("00 60 66 06"), _on_grid("22 42 44 24")),
}


def class_names(count: int) -> list[str]:
    """Return the names of the first `count` classes: shapes, above 12 classes `colour shape`."""
    if count <= len(SHAPES):
        return list(SHAPES)[:count]
    return [f"{hue} {shape}" for hue in HUES for shape in SHAPES][:count]


@dataclass
class Drawing:
    """One finished image."""

    pixels: np.ndarray  # (h, w, 3) uint8
    labels: list[int]
    boxes: np.ndarray  # (M, 4) float32 xyxy in pixels, tight around the visible pixels
    owner: np.ndarray  # (h, w) int16, number of the visible object of each pixel, -1 on the background


def draw_scene(scene: Scene, split: str, index: int) -> Drawing:
    """Draw image `index` of `split`.

    Where the overlap limit leaves no room, objects are left out, so a crowded scene may hold fewer than asked for.
    """
    rng = np.random.default_rng([SPLITS[split], index])
    pixels = _background(scene, rng)
    wanted = int(rng.integers(scene.objects[0], scene.objects[1] + 1))
    owner = np.full(scene.size, -1, np.int16)
    labels: list[int] = []
    drawn: list[int] = []  # pixels of each object before others covered it
    for label, (top, left, h, w) in _place(scene, wanted, rng):
        window = np.s_[top : top + h, left : left + w]
        mask = _shape_mask(label % len(SHAPES), h, w, turn=rng.uniform(-0.25, 0.25))
        colour = _colour(scene, label, pixels[window], rng)
        shade = colour + rng.normal(0, 6, (h, w, 1)).astype(np.float32)
        painted = owner.copy()
        painted[window][mask] = len(labels)
        left_over = np.bincount(painted[painted >= 0], minlength=len(labels))[: len(labels)]
        if (left_over < LEAST_VISIBLE * np.asarray(drawn)).any():
            continue  # it would all but hide another object
        pixels[window][mask] = shade[mask]
        owner = painted
        labels.append(label)
        drawn.append(int(mask.sum()))
    boxes = np.asarray([_bounds(owner == number) for number in range(len(labels))], np.float32).reshape(-1, 4)
    return Drawing(np.clip(pixels, 0, 255).astype(np.uint8), labels, boxes, owner)


def _background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return (h, w, 3) float32 in 0..255: a dull base colour, smooth blotches and fine noise."""
    height, width = scene.size
    base = rng.uniform(70, 180) + rng.uniform(-25, 25, 3)
    blotches = rng.uniform(0, 255, (6, 6, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC), np.float32) - 127.5
    fine = rng.standard_normal((height, width, 1), dtype=np.float32)
    return (base.astype(np.float32) + scene.texture * (0.7 * smooth + 40 * fine)).astype(np.float32)


def _place(scene: Scene, wanted: int, rng: np.random.Generator) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Return (label, (top, left, h, w)) of objects that keep the overlap limit, largest first."""
    height, width = scene.size
    short = min(height, width)
    found: list[tuple[int, tuple[int, int, int, int]]] = []
    for _ in range(wanted):
        label = int(rng.integers(scene.classes))
        side, aspect = rng.uniform(*scene.object_size) * short, rng.uniform(0.7, 1.0)
        h, w = (max(4, round(s)) for s in ((side, side * aspect) if rng.random() < 0.5 else (side * aspect, side)))
        for _ in range(PLACING_TRIES):
            box = (int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
            if all(_iou(box, other) <= scene.overlap for _, other in found):
                found.append((label, box))
                break
    return sorted(found, key=lambda item: -item[1][2] * item[1][3])


def _iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Return the IoU of two boxes (top, left, h, w)."""
    high = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    wide = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(high, 0) * max(wide, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


@cache
def _outlines() -> list[list[np.ndarray]]:
    return [[np.asarray(polygon, np.float64) for polygon in shape] for shape in SHAPES.values()]


def _shape_mask(shape: int, height: int, width: int, turn: float) -> np.ndarray:
    """Return (height, width) bool: the shape turned by `turn` radians, then stretched to fill the window."""
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    polygons = [polygon @ rotation for polygon in _outlines()[shape]]
    low, high = polygons[0].min(0), polygons[0].max(0)
    canvas = Image.new("1", (width, height))
    pen = ImageDraw.Draw(canvas)
    for i, polygon in enumerate(polygons):
        corners = (polygon - low) / (high - low) * (width - 1, height - 1)
        pen.polygon(corners.ravel().tolist(), fill=int(i == 0))  # the outline fills, a hole clears
    return np.array(canvas)


def _colour(scene: Scene, label: int, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an RGB colour (3,) in 0..255 of the label's colour group, well apart from what is behind it."""
    groups = list(HUES.values())
    mean = behind.reshape(-1, 3).mean(0)
    colour = mean
    for _ in range(8):
        hue = rng.random() if scene.classes <= len(SHAPES) else groups[label // len(SHAPES)] + rng.uniform(-0.04, 0.04)
        rgb = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.6, 1.0), rng.uniform(0.5, 1.0))
        colour = np.asarray(rgb, np.float32) * 255
        if np.abs(colour - mean).max() > 80:
            break
    return colour


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the tight box (x0, y0, x1, y1) of the True pixels; the far corner is exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


class SyntheticDetection(DetectionDataset):
    """`length` drawn images of a split. Image ids count from 1, category ids are label + 1."""

    def __init__(
        self,
        scene: Scene,
        *,
        split: str,
        length: int,
        transforms: nn.Module,
        seed: int = 0,
        with_masks: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(transforms=transforms, seed=seed)
        self.scene, self.split, self.with_masks = scene, split, with_masks
        self.image_ids = list(range(1, length + 1))
        self.set_classes(dict(enumerate(class_names(scene.classes), start=1)), raw=False, num_classes=num_classes)

    def load(self, index: int) -> tuple[Tensor, dict]:
        drawing = draw_scene(self.scene, self.split, index)
        areas = np.bincount(drawing.owner[drawing.owner >= 0], minlength=len(drawing.labels))
        boxes = torch.from_numpy(drawing.boxes)
        sample = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=self.scene.size),
            "labels": torch.tensor(drawing.labels, dtype=torch.int64),
            "area": torch.from_numpy(areas.astype(np.float32)),
            "iscrowd": torch.zeros(len(drawing.labels), dtype=torch.int64),
            "image_id": self.image_ids[index],
            "orig_size": tuple(self.scene.size),
        }
        if self.with_masks:
            numbers = np.arange(len(drawing.labels))[:, None, None]
            sample["masks"] = tv_tensors.Mask(torch.from_numpy(drawing.owner == numbers))
        return torch.from_numpy(drawing.pixels).permute(2, 0, 1), sample

    def ground_truth(self) -> dict:
        height, width = self.scene.size
        annotations = []
        for index, image_id in enumerate(self.image_ids):
            _, sample = self.load(index)
            for box, label, area in zip(sample["boxes"].tolist(), sample["labels"].tolist(), sample["area"].tolist()):
                bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": self.category_ids[label]}
                annotations.append({**annotation, "bbox": bbox, "area": area, "iscrowd": 0})
        return {
            "images": [
                {"id": i, "file_name": f"{self.split}_{i:06d}.png", "height": height, "width": width}
                for i in self.image_ids
            ],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(class_names(self.scene.classes))],
            "annotations": annotations,
        }


def build_synthetic(image_set: str, args: argparse.Namespace, *, transforms: nn.Module) -> SyntheticDetection:
    """Return the set that the `--synthetic_*` flags describe."""
    scene = Scene(
        size=tuple(args.synthetic_size),
        classes=args.synthetic_classes,
        objects=tuple(args.synthetic_objects),
        object_size=tuple(args.synthetic_object_size),
        overlap=args.synthetic_overlap,
        texture=args.synthetic_texture,
    )
    split = "train" if args.eval_in_training_set else image_set
    return SyntheticDetection(
        scene,
        split=split,
        length=args.synthetic_train if split == "train" else args.synthetic_val,
        transforms=transforms,
        seed=args.seed,
        with_masks=bool(args.copy_paste) and image_set == "train",
        num_classes=args.num_classes,
    )
