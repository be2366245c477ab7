"""Pictures of the discriminability score: its curves, and its maps beside the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.boxes import cxcywh_to_xyxy
from util.plot import _pyplot, _save


@dataclass
class Example:
    """An image and what was found on it."""

    image_id: int
    pixels: Tensor  # (H, W, 3) in [0, 1]
    boxes: Tensor  # (M, 4) cxcywh in [0, 1]
    maps: dict[str, Tensor]  # (H, W) in [0, 1] of each part; a part may be missing


def draw_curves(results: Sequence[Mapping[str, Any]], parts: Sequence[str], path: Path) -> Path:
    """Write one panel for each part, with IoF over IoB of each result and its area.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(parts), figsize=(5.2 * len(parts), 5), layout="constrained", sharey=True)
    for axes, part in zip(panels, parts):
        axes.plot([0, 1], [0, 1], ":", color="gray", label="no difference (0.500)")
        for name, result in zip(_names(results), results):
            own = result[part]
            # The rising end comes first; beyond the lowest and highest threshold the area counts straight lines.
            x, y = ([0.0, *reversed(own[key]), 1.0] for key in ("iob", "iof"))
            axes.plot(x, y, label=f"{name} ({own['area']:.3f})")
        axes.set_title(part)
        axes.set_xlabel("IoB: share of the background above the threshold")
        axes.set_aspect("equal")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize="small", title="area under the curve", title_fontsize="small")
    panels[0].set_ylabel("IoF: share of the foreground above the threshold")
    return _save(plt, figure, path)


def draw_examples(examples: Sequence[Example], parts: Sequence[str], path: Path) -> Path:
    """Write one row for each image: the image, then the map of each part, with the annotated boxes on all of them.

    The colours of every map run from its lowest to its highest value, which are close to each other in encoders.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    columns = 1 + len(parts)
    size = (3.6 * columns, 3.2 * len(examples))
    figure, grid = plt.subplots(len(examples), columns, figsize=size, layout="constrained", squeeze=False)
    for row, example in zip(grid, examples):
        row[0].imshow(example.pixels.numpy())
        row[0].set_title(f"image {example.image_id}", fontsize="small")
        for axes, part in zip(row[1:], parts):
            if part in example.maps:
                image = axes.imshow(example.maps[part].numpy(), cmap="magma")
                figure.colorbar(image, ax=axes, shrink=0.8, format="%.3f")
                axes.set_title(f"D of the {part}", fontsize="small")
            else:
                axes.imshow(torch.zeros(example.pixels.shape[:2]).numpy(), cmap="gray")
                axes.set_title(f"no positive query in the {part}", fontsize="small")
        for axes in row:
            _draw_boxes(plt, axes, example)
            axes.set_axis_off()
    return _save(plt, figure, path)


def _draw_boxes(plt: Any, axes: Any, example: Example) -> None:
    """Draw the outlines of the boxes, in pixels whose centres have integer coordinates."""
    height, width = example.pixels.shape[:2]
    for left, top, right, bottom in cxcywh_to_xyxy(example.boxes).tolist():
        corner = (left * width - 0.5, top * height - 0.5)
        sides = ((right - left) * width, (bottom - top) * height)
        axes.add_patch(plt.Rectangle(corner, *sides, fill=False, color="cyan", linewidth=1))


def _names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the labels, numbered where several results have the same one."""
    total, seen = Counter(result["label"] for result in results), Counter()
    names = []
    for label in (result["label"] for result in results):
        seen[label] += 1
        names.append(label if total[label] == 1 else f"{label} #{seen[label]}")
    return names
