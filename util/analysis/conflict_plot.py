"""Pictures of the conflict of heads: the matrix of distances, the averages, and the maps beside the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.analysis.discriminability_plot import Example, _draw_boxes, _names
from util.plot import _pyplot, _save


def draw_conflict(results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the matrix of the first result, with its numbers, and the average distances of all results.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    heads = list(dict.fromkeys(head for result in results for head in result["averages"]))
    size = 3.2 + 0.8 * len(results[0]["heads"])
    wide = max(4.5, 0.35 * (len(results) + 1) * len(heads) + 1.5)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(size + wide, max(size, 4)), width_ratios=(size, wide), layout="constrained"
    )
    _draw_matrix(figure, left, results[0])
    _draw_averages(right, results, heads)
    return _save(plt, figure, path)


def _draw_matrix(figure: Any, axes: Any, result: Mapping[str, Any]) -> None:
    names, matrix = result["heads"], result["matrix"]
    picture = axes.imshow(matrix, cmap="viridis", vmin=0)
    figure.colorbar(picture, ax=axes, shrink=0.8)
    middle = max(map(max, matrix)) / 2
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            ink = "white" if value <= middle else "black"
            axes.text(column, row, f"{value:.4f}", ha="center", va="center", color=ink, fontsize="small")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"KL(row || column) in nats, {result['label']}")


def _draw_averages(axes: Any, results: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> None:
    width = 0.8 / len(results)
    for number, (name, result) in enumerate(zip(_names(results), results)):
        averages = result["averages"]
        places = [heads.index(head) + (number - (len(results) - 1) / 2) * width for head in averages]
        mean = sum(averages.values()) / len(averages)
        label = f"{name}: K = {len(averages)}, mean {mean:.4f}"
        axes.bar(places, list(averages.values()), width, label=label)
    axes.set_xticks(range(len(heads)), heads, rotation=45, ha="right")
    axes.set_title("average distance to the other auxiliary heads\n(K = 1: to the DETR head)", fontsize="medium")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(y=0.2)
    axes.legend(fontsize="small")


def draw_examples(examples: Sequence[Example], heads: Sequence[str], path: Path) -> Path:
    """Write one row for each image: the image, then the map of each head divided by its maximum, with the boxes.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    columns = 1 + len(heads)
    size = (3.0 * columns, 3.2 * len(examples))
    figure, grid = plt.subplots(len(examples), columns, figsize=size, layout="constrained", squeeze=False)
    for row, example in zip(grid, examples):
        row[0].imshow(example.pixels.numpy())
        row[0].set_title(f"image {example.image_id}", fontsize="small")
        for axes, head in zip(row[1:], heads):
            cam = example.maps[head]
            axes.imshow((cam / (cam.max() or 1)).numpy(), vmin=0, vmax=1, cmap="magma")
            axes.set_title(head if cam.any() else f"{head}: 0 everywhere", fontsize="small")
        for axes in row:
            _draw_boxes(plt, axes, example)
            axes.set_axis_off()
    return _save(plt, figure, path)
