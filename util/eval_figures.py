"""Pictures of `util.eval_curves`, drawn with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from datasets.confusion import Confusion
from util.eval_curves import RECALL, PrecisionRecall
from util.plot import _pyplot

NAMED = 20  # classes that have a colour of their own; of more, the best and worst EXTREMES have
EXTREMES = 5
NUMBERED = 25  # classes with numbers in the cells of the matrix
MATRIX = 100  # classes up to which there is a matrix; above, only a list of the most frequent confusions
LISTED = 30


def draw_precision_recall(curves: PrecisionRecall, path: Path) -> None:
    """Draw the mean curves and, beside them, those of the classes at IoU 0.5.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained", sharey=True)
    means = (("IoU 0.5", curves.at_50), ("IoU 0.75", curves.at_75), ("IoU 0.5:0.95", curves.mean))
    for label, values in means:
        left.plot(RECALL, values, label=f"{label}: AP {values.mean():.3f}")
    left.set_title(f"mean of {len(curves.classes)} classes")
    ranked = sorted(curves.classes, key=lambda name: -curves.classes[name].mean())
    colors = plt.get_cmap("tab20").colors
    named = ranked if len(ranked) <= NAMED else [*ranked[:EXTREMES], *ranked[-EXTREMES:]]
    for name in ranked:
        if name not in named:
            right.plot(RECALL, curves.classes[name], color="0.7", linewidth=0.6, alpha=min(1.0, 40 / len(ranked)))
    step = 2 if len(named) <= len(colors) // 2 else 1  # every second one of tab20 is a paler twin
    for rank, name in enumerate(named):
        values = curves.classes[name]
        right.plot(RECALL, values, color=colors[rank * step], label=f"{_short(name)}: {values.mean():.3f}")
    right.set_title("classes at IoU 0.5" + (f", best and worst {EXTREMES}" if len(named) < len(ranked) else ""))
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall")
        axes.grid(alpha=0.3)
    left.set_ylabel("precision")
    left.legend(loc="lower left")
    if named:
        right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), title="best AP50 first")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_confusion(table: Confusion, path: Path) -> None:
    """Draw the matrix, coloured by the share of the row; of more than 100 classes a list of the confusions."""
    plt = _pyplot()
    figure = _list(plt, table) if len(table.names) > MATRIX else _matrix(plt, table)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _matrix(plt: Any, table: Confusion) -> Any:
    classes, numbered = len(table.names), len(table.names) <= NUMBERED
    side = 3.5 + (classes + 1) * (0.55 if numbered else 0.16)
    figure, axes = plt.subplots(figsize=(side + 1.5, side), layout="constrained")
    share = row_shares(table)
    # The square root: one mistake in a hundred would otherwise be as white as none.
    image = axes.imshow(share, cmap="Blues", norm=plt.matplotlib.colors.PowerNorm(0.5, 0, 1))
    ticks = range(classes + 1)
    size = 9 if numbered else 6
    axes.set_xticks(ticks, [*map(_short, table.names), "missed"], rotation=90, fontsize=size)
    axes.set_yticks(ticks, [*map(_short, table.names), "background"], fontsize=size)
    axes.set(xlabel="predicted", ylabel="truth")
    axes.set_title(f"detections with score >= {table.threshold:g} at IoU 0.5", fontsize=size + 2)
    for edge in (axes.axhline, axes.axvline):
        edge(classes - 0.5, color="black", linewidth=0.8)
    for row, column in zip(*np.nonzero(table.counts)) if numbered else ():
        color = "white" if share[row, column] > 0.35 else "black"
        axes.text(column, row, table.counts[row, column], ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the row")
    return figure


def _list(plt: Any, table: Confusion) -> Any:
    """Draw the most frequent confusions as bars: a matrix of so many classes could not be read."""
    shown = table.mistaken()[:LISTED]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.27 * max(len(shown), 4)), layout="constrained")
    labels = [f"{_short(truth)} taken for {_short(predicted)}" for truth, predicted, _, _ in shown]
    bars = axes.barh(range(len(shown)), [count for _, _, count, _ in shown], color="tab:blue")
    axes.bar_label(bars, [f" {count} ({share:.0%})" for _, _, count, share in shown], fontsize=8)
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("objects (share of the objects of that class)")
    most = f"the {len(shown)} most frequent confusions of {len(table.names)} classes" if shown else "no confusions"
    axes.set_title(f"{most}; score >= {table.threshold:g}, IoU 0.5", fontsize=10)
    return figure


def row_shares(table: Confusion) -> np.ndarray:
    """Return the counts as shares of their rows; a row without any is 0."""
    return table.counts / np.maximum(table.counts.sum(axis=1, keepdims=True), 1)


def _short(name: str) -> str:
    """Cut a long name; `$` would start a formula."""
    name = name.replace("$", r"\$")
    return name if len(name) <= 24 else name[:23] + "…"
