"""Pictures of which queries learn which objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from util.assignments import Pairs
from util.plot import _pyplot
from util.visualize import _color

DPI = 130
SIDE = 2.5  # inches of the longer side of a panel
IMAGE = 4.2  # inches of the image with its objects
LABEL = 0.6  # inches of the names of groups
FADE = 0.6  # share of white over the image, so that boxes stand out
THICK, DASHED, THIN = 2.2, 1.6, 1.1  # lines of objects in the image and in panels, and of queries
DASHES = (0, (2.5, 1.5))
PROPOSALS = ("encoder", "interm")  # beginnings of the names of sets that are not decoded


def draw_assignment(pairs: Pairs, image: Image.Image, names: Sequence[str], path: Path) -> Path:
    """Write the image with its objects, and beside it a row for each group of queries and a panel for each layer.

    Every object has a colour. In a panel it is dark and dashed, and the boxes that its queries predict on this layer
    are drawn with thin lines of its colour, paler where a pair weighs less. Titles tell how many queries learn an
    object, the mean IoU of their boxes with it, and how many objects have other queries than on the layer before.

    Args:
        pairs: of the image.
        image: the picture.
        names: of the class of each object.
        path: of the PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    colours = [tuple(channel / 255 for channel in _color(i)) for i in range(len(names))]
    scale = SIDE / max(image.size)
    cell = image.width * scale, image.height * scale
    rows, columns = len(pairs.groups), int(pairs.depth.max())
    size = (IMAGE + columns * (cell[0] + 0.1) + LABEL, max(rows * (cell[1] + 0.45), IMAGE + 0.9))
    figure = plt.figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    left, right = figure.subfigures(1, 2, width_ratios=(IMAGE, size[0] - IMAGE))
    _draw_objects(left, image, pairs, names, colours)
    pixels = np.asarray(image, dtype=np.float32) / 255 * (1 - FADE) + FADE
    for group, axes_row in enumerate(right.subplots(rows, columns, squeeze=False)):
        for axes in axes_row[pairs.depth[group] :]:
            axes.set_axis_off()
        for layer, axes in enumerate(axes_row[: pairs.depth[group]], 1):
            _draw_panel(axes, pairs, group, layer, pixels, colours)
        axes_row[0].set_ylabel(_row_label(pairs, group), fontsize=8)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def _row_label(pairs: Pairs, group: int) -> str:
    name, noun = str(pairs.groups[group]), "queries"
    if name.startswith(PROPOSALS):
        noun = "proposals"
    fixed = "\npairs are fixed" if pairs.ready[group] else ""
    return f"{name}\n{pairs.queries[group]} {noun}{fixed}"


def _draw_panel(
    axes: Any, pairs: Pairs, group: int, layer: int, pixels: np.ndarray, colours: Sequence[tuple[float, ...]]
) -> None:
    """Draw objects and the boxes of their queries of one group on one layer."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0))
    name = str(pairs.groups[group])
    chosen = pairs.of(name, layer)
    strongest = np.zeros(len(pairs.labels))
    np.maximum.at(strongest, pairs.object[chosen], pairs.weight[chosen])
    for i in chosen:
        share = pairs.weight[i] / strongest[pairs.object[i]]
        _box(axes, pairs.box[i], (width, height), color="white", linewidth=THIN + 0.8, alpha=0.5 * share)
        _box(axes, pairs.box[i], (width, height), color=colours[pairs.object[i]], linewidth=THIN, alpha=float(share))
    for box, colour in zip(pairs.boxes, colours):  # on top, or many boxes would hide them
        _box(axes, box, (width, height), color=_dark(colour), linewidth=DASHED, linestyle=DASHES)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(_panel_title(pairs, group, layer, chosen), fontsize=7.5, pad=3)


def _panel_title(pairs: Pairs, group: int, layer: int, chosen: np.ndarray) -> str:
    """Return how many queries learn, how near they are, and how many objects others had on the layer before."""
    name = str(pairs.groups[group])
    lines = ["proposals" if name.startswith(PROPOSALS) else f"layer {layer}"]
    if not len(chosen):
        return f"{lines[0]}\nno query learns an object"
    queries = len(set(pairs.query[chosen]))
    noun = "" if name.startswith(PROPOSALS) else " query" if queries == 1 else " queries"
    lines[0] += f": {queries}{noun}, IoU {pairs.iou[chosen].mean():.2f}"
    missing = len(pairs.labels) - len(set(pairs.object[chosen]))
    notes = [f"{missing} without a query"] * (missing > 0)
    if layer > 1 and not pairs.ready[group] and len(pairs.of(name, layer - 1)):
        notes.append(f"{pairs.changed(name, layer)} of {len(pairs.labels)} changed")
    return "\n".join([lines[0], ", ".join(notes)])


def _draw_objects(
    figure: Any, image: Image.Image, pairs: Pairs, names: Sequence[str], colours: Sequence[tuple[float, ...]]
) -> None:
    """Draw the image with its objects and their names."""
    from matplotlib.lines import Line2D

    axes = figure.subplots()
    axes.imshow(np.asarray(image), extent=(0, image.width, image.height, 0))
    for number, (box, colour) in enumerate(zip(pairs.boxes, colours)):
        _box(axes, box, image.size, color=colour, linewidth=THICK)
        x, y = (box[0] - box[2] / 2) * image.width, (box[1] - box[3] / 2) * image.height
        luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        style = {"facecolor": colour, "edgecolor": "none", "pad": 1.0}
        ink = "black" if luma > 0.55 else "white"
        axes.text(max(x, 0), max(y, 0), names[number], fontsize=6.5, va="bottom", color=ink, bbox=style, clip_on=False)
    axes.set_xlim(0, image.width)
    axes.set_ylim(image.height, 0)
    axes.set_axis_off()
    axes.set_anchor("N")
    axes.set_title(f"image {pairs.image_id}, epoch {pairs.epoch + 1}", fontsize=10)
    marks = [
        Line2D([], [], color=_dark(colours[0]), linewidth=DASHED, linestyle=DASHES, label="object"),
        Line2D([], [], color=colours[0], linewidth=THIN, label="box of a query that learns it"),
    ]
    where = {"loc": "upper left", "bbox_to_anchor": (0, -0.01), "borderaxespad": 0}
    axes.legend(handles=marks, fontsize=8, frameon=False, **where)


def _dark(colour: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(0.6 * channel for channel in colour)


def _box(axes: Any, box: np.ndarray, size: tuple[int, int], **style: Any) -> None:
    """Draw a cxcywh box that is relative to a picture of `size` (width, height)."""
    from matplotlib.patches import Rectangle

    x, y, w, h = box * np.array([*size, *size])
    axes.add_patch(Rectangle((x - w / 2, y - h / 2), w, h, fill=False, **style))
