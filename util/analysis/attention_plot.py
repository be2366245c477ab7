"""Pictures of sampling points over an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from util.analysis.points import Look
from util.plot import _pyplot

DPI = 150
SIDE = 3.0  # inches of the longer side of a panel
BAR = 0.8  # inches of the scale of colours and the names of rows
COLUMNS, OF_MANY = 3, 6  # most panels side by side, of a single query so that it fits a page, and of several
FADE = 0.35  # share of white over the image, so that points stand out
ZOOM_BELOW = 0.4  # a second view is drawn where the points fill a smaller share of the image's longer side
MARGIN = 0.25  # of that view, as a share of what it shows
BOX, CROSS, REFERENCE = "#e41a1c", "#00c000", "#00c000"
COLOURS = "plasma"


View = tuple[float, float, float, float]  # x0, y0, x1, y1 of a part of the picture, pixels


@dataclass(frozen=True)
class Titles:
    """What is written into a picture."""

    figure: str
    rows: Sequence[str] = ()  # one for each row; none: there is a single one
    class_names: Sequence[str] = ()


def draw_looks(rows: Sequence[Sequence[Look]], image: Image.Image, titles: Titles, path: Path) -> Path:
    """Write a panel for each layer of each query, points of all heads and levels coloured by their weight.

    The predicted box of the layer is red; the green cross is where the sampling starts, with a dotted box where that is
    a box. Where the points of a single query lie close together there is a second row with a closer view.

    Args:
        rows: `[query][layer]`, all of the same layers.
        image: the picture.
        titles: what is written.
        path: of the PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    whole = (0.0, 0.0, float(image.width), float(image.height))
    views: list[tuple[Sequence[Look], View, bool]] = []
    close = close_view(rows[0], whole) if len(rows) == 1 else None
    most = COLUMNS if len(rows) == 1 else OF_MANY
    for looks in rows:
        parts = [looks[i : i + most] for i in range(0, len(looks), most)]
        for part in parts:
            views += [(part, whole, True)] + ([(part, close, False)] if close else [])
    columns = max(len(looks) for looks, _, _ in views)
    heights = [_panel_size(view)[1] for _, view, _ in views]
    width = columns * _panel_size(whole)[0]
    size = (width + 0.1 * columns + BAR, sum(heights) + 0.3 * len(views) + 0.6)
    figure = plt.figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    grid = figure.subplots(len(views), columns, squeeze=False, height_ratios=heights)
    pixels = _faded(image)
    strongest = max(float(look.weights.max()) for looks in rows for look in looks)
    drawn = None
    for number, (axes_row, (looks, view, first)) in enumerate(zip(grid, views)):
        for axes in axes_row[len(looks) :]:
            axes.set_axis_off()
        for axes, look in zip(axes_row, looks):
            drawn = _draw(plt, axes, look, pixels, view, strongest)
            if first and close:
                axes.add_patch(_frame(plt, close))
            axes.set_title(_title(look, titles, whole) if first else "closer", fontsize=8, pad=3)
        if titles.rows:
            axes_row[0].set_ylabel(titles.rows[number * len(rows) // len(views)], fontsize=8)
    shrink = min(1.0, (heights[0] + 0.2) / size[1])  # as high as a panel
    bar = figure.colorbar(drawn, ax=grid, shrink=shrink, aspect=18, pad=0.01, fraction=0.4 * BAR / size[0])
    bar.ax.tick_params(labelsize=7)
    bar.set_label("attention weight", fontsize=8)
    figure.suptitle(titles.figure, fontsize=9)
    figure.legend(handles=_marks(plt, rows[0]), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def close_view(looks: Sequence[Look], whole: View) -> View | None:
    """Return the part (x0, y0, x1, y1) of the picture where the points and boxes of a query are, in all its layers.

    None if they fill a good part of the picture anyway. A twentieth of the points on each side may lie outside. The
    part has the shape of the picture.
    """
    points = np.concatenate([look.locations.reshape(-1, 2) for look in looks])
    corners = np.concatenate([look.box.reshape(2, 2) for look in looks if look.box is not None] or [points])
    low = np.minimum(np.quantile(points, 0.05, axis=0), corners.min(0)).clip(0)
    high = np.maximum(np.quantile(points, 0.95, axis=0), corners.max(0)).clip(None, whole[2:])
    sides = np.array(whole[2:])
    share = float(((high - low) / sides).max() * (1 + MARGIN))
    if not 0 < share < ZOOM_BELOW:
        return None
    start = ((low + high) / 2 - sides * share / 2).clip(0, sides * (1 - share))
    return (*start.tolist(), *(start + sides * share).tolist())


def _panel_size(view: View) -> tuple[float, float]:
    """Return width and height of a panel in inches."""
    width, height = view[2] - view[0], view[3] - view[1]
    scale = SIDE / max(width, height)
    return width * scale, height * scale


def _faded(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, dtype=np.float32) / 255
    return pixels * (1 - FADE) + FADE


def _draw(plt: Any, axes: Any, look: Look, pixels: np.ndarray, view: View, strongest: float) -> Any:
    """Draw one panel; return the points."""
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(0.5, 0, strongest)  # most weights are small: a root in the scale tells them apart
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest" if width < 400 else "antialiased")
    weights = look.weights.ravel()
    order = weights.argsort(kind="stable")  # the strongest on top
    x, y = look.locations.reshape(-1, 2)[order].T
    points = axes.scatter(
        x, y, c=weights[order], s=11, cmap=COLOURS, norm=norm, edgecolors="black", linewidths=0.3, zorder=3
    )
    if len(look.reference) == 4:
        cx, cy, w, h = look.reference
        axes.add_patch(
            plt.Rectangle((cx - w / 2, cy - h / 2), w, h, fill=False, color=REFERENCE, linewidth=1.0, linestyle=":")
        )
    if look.box is not None:
        left, top, right, bottom = look.box
        axes.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color=BOX, linewidth=1.5))
    axes.plot(*look.reference[:2], marker="+", color="white", markersize=10, markeredgewidth=3.2, zorder=4)
    axes.plot(*look.reference[:2], marker="+", color=CROSS, markersize=9, markeredgewidth=1.8, zorder=5)
    axes.set_xlim(view[0], view[2])
    axes.set_ylim(view[3], view[1])
    axes.set_xticks([])
    axes.set_yticks([])
    return points


def _frame(plt: Any, view: View) -> Any:
    """Return the outline of the closer view."""
    return plt.Rectangle(view[:2], view[2] - view[0], view[3] - view[1], fill=False, color="0.15", linewidth=0.7)


def _title(look: Look, titles: Titles, whole: View) -> str:
    """Return the title of a panel: layer, class and score, and how much attention leaves the picture."""
    x, y = look.locations[..., 0], look.locations[..., 1]
    outside = (x < 0) | (y < 0) | (x > whole[2]) | (y > whole[3])
    share = float(look.weights[outside].sum() / len(look.weights))
    words = [f"layer {look.layer}"]
    if look.label >= 0:
        words[0] += f": {titles.class_names[look.label]} {look.score:.2f}"
    return ", ".join(words + [f"{100 * share:.0f} % of the weight outside"] * (share >= 0.005))


def _marks(plt: Any, looks: Sequence[Look]) -> list[Any]:
    from matplotlib.lines import Line2D

    cross = {"linestyle": "", "marker": "+", "markersize": 8, "markeredgewidth": 1.8}
    marks = [Line2D([], [], color=CROSS, label="reference point", **cross)]
    if any(len(look.reference) == 4 for look in looks):
        marks.append(Line2D([], [], color=REFERENCE, linewidth=1.0, linestyle=":", label="reference box"))
    if looks[0].box is not None:
        marks.append(Line2D([], [], color=BOX, linewidth=1.5, label="box of the layer"))
    dot = {"linestyle": "", "marker": "o", "markersize": 4, "markeredgewidth": 0.3, "markeredgecolor": "black"}
    marks.append(Line2D([], [], color=plt.get_cmap(COLOURS)(0.6), label="sampling point (all heads and levels)", **dot))
    return marks
