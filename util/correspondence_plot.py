"""Pictures of learned correspondences over a training, one for each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from util.correspondence import Snapshot
from util.plot import _pyplot, _save

PANELS = 8  # most epochs in a picture
IN_A_ROW = 4
OBJECTS = 20  # most rows of a panel, the first objects
VISIBLE = 0.01  # C from which a query that nobody chose has a column
SPARE = 8  # most columns of such queries
FEWEST = 8  # columns that a panel has room for at least
# Inches. Numbers of queries and names of objects need so much to stay readable.
COLUMN, ROW, PANEL, IMAGE, LEGEND = 0.125, 0.2, 3.1, 4.0, 1.0
RING, CROSS, LINE, NO_COLUMN = "#ff7f0e", "black", "0.25", "0.93"


def draw_correspondence(snapshots: Sequence[Snapshot], image: Image.Image, names: Sequence[str], path: Path) -> Path:
    """Write the image with its objects, and beside it their correspondences on the last decoder layer.

    Every panel is an epoch: a row is an object, a column a query, the colour is C. A ring is a chosen pair (S > 0), a
    cross the pair of the cheapest one-to-one matching.

    Args:
        snapshots: of one image by epoch, not empty; up to `PANELS` of them are drawn, the first and the last always.
        image: the picture.
        names: of the class of each object.
        path: of the PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    shown = [snapshots[i] for i in evenly(len(snapshots), PANELS)]
    orders = [order_of_columns(*_last_layer(snapshot, OBJECTS)) for snapshot in shown]
    widest = max(FEWEST, *(len(order) for order, _ in orders))
    lines = -(-len(shown) // IN_A_ROW)
    columns = -(-len(shown) // lines)
    width = columns * max(PANEL, COLUMN * widest + 0.2) + LEGEND
    height = lines * (ROW * min(len(names), OBJECTS) + 1.0) + 0.3
    figure = plt.figure(figsize=(IMAGE + width, max(height, 4.2)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(IMAGE, width))
    _draw_image(plt, left, shown[-1], image)
    grid = right.subplots(lines, columns, squeeze=False)
    labels = [f"{number} {name}" for number, name in enumerate(names, 1)][:OBJECTS]
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for place, (axes, snapshot, order) in enumerate(zip(grid.flat, shown, orders)):
        drawn = _draw_panel(axes, snapshot, *order, labels if place % columns == 0 else [""] * len(labels))
        axes.set_xlim(-0.5, widest - 0.5)  # cells of the same size in all panels
    bar = right.colorbar(drawn, ax=grid, shrink=0.6, aspect=30, ticks=(0, 0.01, 0.1, 0.25, 0.5, 1))
    bar.ax.tick_params(labelsize=8)
    bar.ax.set_title("C", fontsize=9)
    left_out = f", the first {OBJECTS} of {len(names)} objects" if len(names) > OBJECTS else ""
    right.suptitle(f"rows: objects{left_out}; columns: queries; decoder layer {shown[-1].layers[-1] + 1}", fontsize=10)
    return _save(plt, figure, path)


def evenly(count: int, most: int) -> list[int]:
    """Return up to `most` of the numbers 0..count-1 at even distances, the first and the last always."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def order_of_columns(c: np.ndarray, s: np.ndarray, optimal: np.ndarray) -> tuple[list[int], int]:
    """Return the queries that get a column, and how many of them, the first ones, some object chose.

    The strongest query of the first object comes first, then that of the second one: where every object has a query of
    its own, they are a diagonal. Then come the queries of other chosen pairs; behind them those that nobody chose: the
    ones of the cheapest matching, and up to `SPARE` with C above `VISIBLE`, by the object that they belong to most.

    Args:
        c: (M, N) correspondence.
        s: (M, N) weights of the chosen pairs.
        optimal: (M,) query of each object in the cheapest matching, -1: none.
    """
    chosen = (s > 0).any(0)
    firsts = [int(row.argmax()) for row in s if row.max() > 0]
    firsts += np.flatnonzero(chosen).tolist()
    order = list(dict.fromkeys(firsts))
    strongest = np.where(chosen, 0, c.max(0))
    spare = [int(i) for i in np.argsort(-strongest, kind="stable")[:SPARE] if strongest[i] > VISIBLE]
    rest = {int(i) for i in optimal if i >= 0} | set(spare)
    owner = {int(i): row for row, i in reversed(list(enumerate(optimal)))}
    rest = sorted(rest - set(order), key=lambda i: (owner.get(i, c[:, i].argmax()), i))
    return order + rest, len(order)


def _last_layer(snapshot: Snapshot, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return C, S and the cheapest matching of the first `rows` objects."""
    return snapshot.c[-1][:rows].astype(np.float32), snapshot.s[-1][:rows], snapshot.optimal[-1][:rows]


def _draw_panel(axes: Any, snapshot: Snapshot, columns: list[int], chosen: int, labels: Sequence[str]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    c, s, optimal = _last_layer(snapshot, len(labels))
    # Marks stay visible on the darkest blue; the root in the scale shows the first signs of a preference.
    colors = LinearSegmentedColormap.from_list("blues", ["white", "#c6dbef", "#6baed6", "#2e7ebc"])
    axes.set_facecolor(NO_COLUMN)
    drawn = axes.imshow(c[:, columns], cmap=colors, norm=PowerNorm(0.5, 0, 1), aspect="auto")
    row, column = np.nonzero(s[:, columns] > 0)
    axes.scatter(column, row, s=70, facecolors="none", edgecolors=RING, linewidths=1.8)
    rows = np.flatnonzero(optimal >= 0)
    axes.scatter([columns.index(query) for query in optimal[rows]], rows, s=20, marker="x", color=CROSS, linewidths=1.2)
    if chosen < len(columns):
        axes.axvline(chosen - 0.5, color=LINE, linewidth=1.5)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6.5)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    title = f"epoch {snapshot.epoch + 1}: distinct {snapshot.distinct():.2f}, agree {snapshot.agree():.2f}"
    axes.set_title(title, fontsize=9)
    return drawn


def _draw_image(plt: Any, figure: Any, snapshot: Snapshot, image: Image.Image) -> None:
    from matplotlib.lines import Line2D

    axes = figure.subplots()
    axes.imshow(np.asarray(image))
    scale = np.array([image.width, image.height, image.width, image.height])
    for number, (x, y, width, height) in enumerate(snapshot.boxes[:OBJECTS] * scale, 1):
        corner = (x - width / 2 - 0.5, y - height / 2 - 0.5)
        axes.add_patch(plt.Rectangle(corner, width, height, fill=False, color="cyan", linewidth=1.2))
        style = {"facecolor": "cyan", "edgecolor": "none", "pad": 1.0}
        axes.text(*corner, str(number), fontsize=8, va="bottom", bbox=style)
    axes.set_axis_off()
    axes.set_anchor("N")
    axes.set_title(f"image {snapshot.image_id}", fontsize=10)
    marks = [
        Line2D([], [], linestyle="", marker="o", markersize=9, markerfacecolor="none", color=RING, markeredgewidth=1.6),
        Line2D([], [], linestyle="", marker="x", markersize=5, color=CROSS),
        Line2D([], [], color=LINE, linewidth=1.5),
    ]
    texts = ("chosen pair (S > 0)", "cheapest one-to-one pair (Hungarian)", "behind the line: chosen by no object")
    figure.legend(marks, texts, loc="outside upper center", fontsize=8)
