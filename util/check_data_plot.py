"""Histograms of `main.py --check_data`: classes, sizes of objects, objects per image, sizes of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from util.check_data_survey import Survey
from util.plot import _pyplot, _save

MOST_BARS = 40  # classes that are shown
SMALL, MEDIUM = 32, 96  # pixels: square roots of COCO's limits of the area


def draw_histograms(surveys: dict[str, Survey], queries: int, path: Path) -> Path:
    """Write the histograms of the sets into one picture.

    Args:
        surveys: by name, with at least one image each.
        queries: number of one-to-one queries, drawn as a line where images come near it.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, ((classes, sizes), (counts, images)) = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    _classes(classes, surveys)
    roots = {p: np.sqrt(np.maximum(one.packed.areas[one.targets()], 1)) for p, one in surveys.items()}
    many = {p: np.bincount(one.image_of[one.targets()], minlength=len(one.image_ids)) for p, one in surveys.items()}
    every = np.concatenate([*roots.values(), [SMALL / 2, MEDIUM * 2]])
    size_bins, count_bins = np.geomspace(every.min(), every.max(), 40), _whole_bins(np.concatenate([*many.values()]))
    for number, (part, one) in enumerate(surveys.items()):
        color = f"C{number}"
        _steps(sizes, roots[part], size_bins, part, color)
        _steps(counts, many[part], count_bins, part, color)
        images.scatter(one.sizes[:, 1], one.sizes[:, 0], s=12, alpha=0.4, color=color, label=part)
    if max(counted.max() for counted in many.values()) > queries / 2:
        counts.axvline(queries, color="k", linestyle=":", label="one-to-one queries")
    sizes.set_xscale("log")
    for limit in (SMALL, MEDIUM):
        sizes.axvline(limit, color="k", linestyle=":")
    _finish(
        sizes, "objects by size (dotted: COCO's small | medium | large)", "square root of the area, pixels", "share"
    )
    _finish(counts, "images by number of objects", "objects", "share")
    _finish(images, "images by size", "width, pixels", "height, pixels")
    return _save(plt, figure, path)


def _classes(axes: Any, surveys: dict[str, Survey]) -> None:
    """Draw the objects of the most frequent classes, by the order of the first set."""
    first = next(iter(surveys.values()))
    names = {number: name for one in reversed(surveys.values()) for number, name in one.categories.items()}
    counted = {part: _per_category(one) for part, one in surveys.items()}
    order = sorted(names, key=lambda number: -counted[first.part].get(number, 0))[:MOST_BARS]
    width = 0.8 / len(surveys)
    for k, (part, counts) in enumerate(counted.items()):
        places = np.arange(len(order)) + k * width
        axes.bar(places, [counts.get(number, 0) for number in order], width, label=part, color=f"C{k}", align="edge")
    axes.set_xticks(np.arange(len(order)) + 0.4, [names[i] for i in order], rotation=90 if len(order) > 6 else 0)
    axes.tick_params(axis="x", labelsize="small" if len(order) <= 20 else "x-small")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    more = f" (the {MOST_BARS} most frequent of {len(names)})" if len(names) > MOST_BARS else ""
    _finish(axes, f"objects by class{more}", "", "objects")


def _per_category(one: Survey) -> dict[int, int]:
    counts = np.bincount(one.packed.labels[one.targets()], minlength=len(one.categories))
    return dict(zip(one.categories, counts.tolist()))


def _whole_bins(values: np.ndarray) -> np.ndarray:
    """Return borders of bins around whole numbers, about 40 of them."""
    most = int(values.max(initial=1)) + 1
    return np.arange(0, most + 1, max(most // 40, 1)) - 0.5


def _steps(axes: Any, values: np.ndarray, bins: np.ndarray, label: str, color: str) -> None:
    weights = np.full(len(values), 1 / max(len(values), 1))
    axes.hist(values, bins, weights=weights, histtype="stepfilled", alpha=0.35, color=color, label=label)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
