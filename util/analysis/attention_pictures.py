"""Sampling points and attention weights over images, as in fig. 6 of Deformable-DETR: `--analyse attention`.

For every image and query there is `attention/image_ID_query_Q_layers_1-6.png`, one panel for each decoder layer, and an
.npz file of the same name with the numbers; for the encoder `attention/image_ID_pixel_X_Y_layers_1-6.png`, with a row
for the token of each level. In an .npz file Q is 1 for a query and the number of levels for tokens:

    layers      (L,) layers, from 1
    locations   (Q, L, heads, levels, points, 2) x and y in pixels of the image file, its corner at (0, 0)
    weights     (Q, L, heads, levels, points), sum 1 over levels and points
    head, level (heads, levels, points) number of the head, from 0, and of the level, from 0, the finest
    reference   (Q, L, 4) box cxcywh that the sampling starts from, pixels; width and height are nan for a point
    boxes       (Q, L, 4) xyxy predicted by the layer, pixels; scores and labels (Q, L); queries only
    size        (2,) height and width of the image file
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import DetectionDataset, collate
from models.detector import Detector
from util import dist
from util.analysis.attention_plot import Titles, draw_looks
from util.analysis.base import Subject
from util.analysis.points import AttentionOptions, Look, best_queries, watch_points
from util.errors import UserError
from util.picture_args import wanted_queries


def attention_options(args: Namespace) -> AttentionOptions:
    """Return what the flags ask for."""
    best, queries = wanted_queries(args.attention_queries)
    numbers = args.attention_encoder
    return AttentionOptions(
        best=best,
        queries=queries,
        layers=tuple(sorted(set(args.attention_layers))),
        points=tuple(zip(numbers[::2], numbers[1::2])),
        images=len(args.attention_images) or args.analyse_images,
        image_ids=tuple(args.attention_ids),
    )


def analyse_attention(subject: Subject) -> list[Path]:
    """Write pictures and numbers of the validation images that are asked for.

    Raises:
        UserError: there is no such image, query or point.
    """
    folder = subject.folder / "attention"
    return draw_attention(subject.model, subject.loader.dataset, subject.attention, subject.device, folder)


@torch.no_grad()
def draw_attention(
    model: Detector, dataset: DetectionDataset, options: AttentionOptions, device: torch.device, folder: Path
) -> list[Path]:
    """Do the same for the images of any data set, one at a time.

    Returns:
        the files; without matplotlib those with numbers only.

    Raises:
        UserError: there is no such image, query or point.
    """
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for index in chosen_images(dataset, options):
        images, (target,) = collate([dataset[index]])
        with watch_points(model) as seen:
            output = model(images.to(device))
        _check_queries(options.queries, output.pred_logits.shape[1])
        size, picture = target.orig_size, dataset.load_image(index).convert("RGB")
        name, title = _names(dataset, index)
        decoder = options.layers or range(1, len(seen.decoder) + 1)
        queries = list(options.queries) or best_queries(output, 0, options.best)
        for query, looks in zip(queries, seen.queries(output, 0, queries, decoder, size)):
            file = folder / f"{name}_query_{query}_{layers_name(decoder)}"
            titles = Titles(f"{title}, query {query}", class_names=dataset.class_names)
            written += _write([looks], picture, titles, file)
        for point in options.points:
            _check_point(point, picture.size, title)
            encoder = options.layers or range(1, len(seen.encoder) + 1)
            rows = seen.tokens(0, point, encoder, size)
            file = folder / f"{name}_pixel_{point[0]:g}_{point[1]:g}_encoder_{layers_name(encoder)}"
            words = [f"level {i} ({h} x {w})" for i, (h, w) in enumerate(seen.memory.shapes, 1)]
            titles = Titles(f"{title}, encoder tokens at ({point[0]:g}, {point[1]:g})", rows=words)
            written += _write(rows, picture, titles, file)
    return written


def chosen_images(dataset: DetectionDataset, options: AttentionOptions) -> list[int]:
    """Return the indices of the images to draw.

    Raises:
        UserError: the data set has no image of an id.
    """
    if options.image_ids:
        index_of = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
        if missing := [i for i in options.image_ids if i not in index_of]:
            some = ", ".join(map(str, dataset.image_ids[:3]))
            raise UserError(f"--attention_ids {missing[0]}: no validation image has this id; they begin with {some}")
        return [index_of[i] for i in options.image_ids]
    annotated = dataset.coco.imgToAnns
    indices = range(len(dataset.image_ids))
    return sorted(indices, key=lambda i: not annotated.get(dataset.image_ids[i]))[: options.images]


def layers_name(layers: Sequence[int]) -> str:
    """Return `layer_2`, `layers_1-6` or `layers_1_6`, as file names have it."""
    first, last = layers[0], layers[-1]
    if first == last:
        return f"layer_{first}"
    whole = list(layers) == list(range(first, last + 1))
    return "layers_" + (f"{first}-{last}" if whole else "_".join(map(str, layers)))


def arrays(rows: Sequence[Sequence[Look]], size: tuple[float, float]) -> dict[str, np.ndarray]:
    """Return what an .npz file holds, for the queries `rows` of an image of `size` (h, w)."""

    def stack(name: str) -> np.ndarray:
        return np.array([[getattr(look, name) for look in row] for row in rows])

    one = rows[0][0]
    head, level = np.indices(one.weights.shape)[:2]
    found = {name: stack(name) for name in ("locations", "weights")}
    # Fixed queries begin as points and are boxes from the second layer on, if boxes are refined.
    padded = [
        [np.pad(look.reference, (0, 4 - len(look.reference)), constant_values=np.nan) for look in row] for row in rows
    ]
    found["reference"] = np.array(padded)
    if one.box is not None:
        found |= {"boxes": stack("box"), "scores": stack("score"), "labels": stack("label")}
    return found | {
        "layers": np.array([look.layer for look in rows[0]]),
        "head": head,
        "level": level,
        "size": np.array(size),
    }


def _write(rows: list[list[Look]], picture: Any, titles: Titles, file: Path) -> list[Path]:
    """Write numbers and picture; the name of `file` has no ending yet."""
    numbers = file.with_name(file.name + ".npz")
    np.savez_compressed(numbers, **arrays(rows, (picture.height, picture.width)))
    try:
        return [numbers, draw_looks(rows, picture, titles, file.with_name(file.name + ".png"))]
    except UserError as error:  # no matplotlib
        dist.info(f"no picture {file.name}: {error}")
        return [numbers]


def _names(dataset: DetectionDataset, index: int) -> tuple[str, str]:
    """Return how the files about an image begin, and what it is called in a picture."""
    if hasattr(dataset, "picture_name"):
        return (dataset.picture_name(index),) * 2
    image_id = dataset.image_ids[index]
    return f"image_{image_id}", f"image {image_id}"


def _check_queries(queries: Sequence[int], count: int) -> None:
    if wrong := [q for q in queries if q >= count]:
        raise UserError(f"--attention_queries {wrong[0]}: this model has the queries 0 to {count - 1}")


def _check_point(point: tuple[float, float], size: tuple[int, int], title: str) -> None:
    (x, y), (width, height) = point, size
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"--attention_encoder {x:g} {y:g}: {title} has {width} x {height} pixels, x must be below {width} and y "
            f"below {height}"
        )
