"""Charts as inline SVG: they need no package, stay sharp at every size, and say their numbers under the mouse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from util.report.html import Html, el, join

COLORS = ("#1f77b4", "#e6550d", "#2ca02c", "#9467bd", "#d62728", "#17a2b8", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
GREY = "#c4c9d1"
WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 30
MARKED = 60  # points of a line up to which each is marked


@dataclass(frozen=True)
class Line:
    """One line of a chart; points that are not finite are left out."""

    name: str  # "" is not in the legend
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dashed: bool = False


def line_chart(
    title: str, lines: Sequence[Line], x_label: str, *, y_range: tuple[float, float] | None = None, log: bool = False
) -> Html:
    """Return a figure with a title, a chart and a legend.

    Args:
        y_range: of the axis; None: that of the values.
        log: logarithmic y axis; values that are not above 0 are left out.
    """
    kept = [
        (line, [(x, y) for x, y in zip(line.x, line.y) if math.isfinite(y) and (y > 0 or not log)]) for line in lines
    ]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return el("figure", el("figcaption", title), el("p", "no values", class_="note"), class_="chart")
    xs = [x for _, points in kept for x, _ in points]
    ys = [math.log10(y) if log else y for _, points in kept for _, y in points]
    x_low, x_high = _widened(min(xs), max(xs), 0.0)
    y_low, y_high = y_range or _widened(min(ys), max(ys), 0.05)

    def place(x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if log else y
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(x_low, x_high, y_low, y_high, x_label, place, log)]
    for line, points in kept:
        parts.append(_drawn(line, [place(*point) for point in points], points))
    svg = el("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return el("figure", el("figcaption", title), svg, _legend([line for line, _ in kept]), class_="chart")


def _drawn(line: Line, spots: list[tuple[float, float]], points: list[tuple[float, float]]) -> Html:
    way = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    width = 0.7 if line.color == GREY else 1.8
    dash = "5 4" if line.dashed else None
    path = el("path", d=way, fill="none", stroke=line.color, stroke_width=width, stroke_dasharray=dash)
    if len(points) > MARKED or not line.name:
        return el("g", el("title", line.name), path) if line.name else path
    marks = [
        el("circle", el("title", f"{line.name} {x:g}: {y:.4g}"), cx=f"{a:.1f}", cy=f"{b:.1f}", r=2.6, fill=line.color)
        for (a, b), (x, y) in zip(spots, points)
    ]
    return join([path, *marks])


def _axes(x_low: float, x_high: float, y_low: float, y_high: float, x_label: str, place, log: bool) -> Html:
    parts = []
    bottom = HEIGHT - BOTTOM
    for value in _log_ticks(10**y_low, 10**y_high) if log else _ticks(y_low, y_high, 6):
        y, shown = place(x_low, value)[1], _number(value)
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", stroke="#e6e8ec"))
        parts.append(el("text", shown, x=LEFT - 5, y=f"{y + 3.5:.1f}", text_anchor="end"))
    for value in _ticks(x_low, x_high, 6, whole=x_label == "epoch"):
        x = place(value, 1.0)[0]
        parts.append(el("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=bottom, y2=bottom + 4, stroke="#8a919c"))
        parts.append(el("text", f"{value:g}", x=f"{x:.1f}", y=bottom + 15, text_anchor="middle"))
    parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, stroke="#8a919c"))
    parts.append(el("text", x_label, x=(LEFT + WIDTH) / 2, y=HEIGHT - 3, text_anchor="middle"))
    return join(parts)


def _widened(low: float, high: float, margin: float) -> tuple[float, float]:
    """Return a range with a margin; a single value gets room on both sides."""
    if high == low:
        room = abs(low) * 0.5 or 1.0
        return low - room, high + room
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return about `count` round numbers from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten from `low` to `high`; of few of them, also their double and fivefold."""
    powers = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = [power * factor for power in powers for factor in (1, 2, 5)]
    ticks = [value for value in fine if low <= value <= high]
    return ticks if len(ticks) <= 7 else [value for value in powers if low <= value <= high]


def _number(value: float) -> str:
    """Return a short number: 0.25, 3e-5."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _legend(lines: Sequence[Line]) -> Html | None:
    named = [line for line in lines if line.name]
    items = []
    for line in named:
        style = f"border-top:3px {'dashed' if line.dashed else 'solid'} {line.color}"
        items.append(el("span", el("i", style=style), line.name))
    return el("div", *items, class_="legend") if named else None


def heat_map(names: Sequence[str], counts: np.ndarray) -> Html:
    """Return the confusion matrix (K + 1, K + 1), coloured by the share of the row, numbers under the mouse."""
    rows, columns = [*names, "background"], [*names, "missed"]
    numbered = len(rows) <= 26
    cell, font = (30, 10.5) if numbered else (10, 7.5)
    longest = max(len(_cut(name)) for name in rows)
    margin = longest * font * 0.6 + 8
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = cell * len(rows)
    parts = [el("rect", x=margin, y=margin, width=side, height=side, fill="#fbfcfe", stroke="#8a919c")]
    for r, c in zip(*(place.tolist() for place in np.nonzero(counts))):
        x, y, value = margin + c * cell, margin + r * cell, int(counts[r, c])
        shade = math.sqrt(share[r, c])  # else one mistake in a hundred is as white as none
        title = f"{rows[r]} as {columns[c]}: {value} ({share[r, c]:.1%})"
        inside = el("rect", el("title", title), x=x, y=y, width=cell, height=cell, fill=_shade(shade))
        ink = "#fff" if shade > 0.6 else "#1d2430"
        middle = {"x": x + cell / 2, "y": y + cell / 2 + 3.5, "text_anchor": "middle", "pointer_events": "none"}
        parts.append(join([inside, el("text", value, **middle, fill=ink) if numbered else None]))
    for i, (row, column) in enumerate(zip(rows, columns)):
        at = margin + (i + 0.5) * cell
        parts.append(el("text", _cut(row), x=margin - 5, y=at + font / 3, text_anchor="end"))
        turn = f"translate({at + font / 3:.1f},{margin - 5:.1f}) rotate(-90)"
        parts.append(el("text", _cut(column), transform=turn))
    edge = margin + side - cell
    parts.append(el("line", x1=margin, x2=margin + side, y1=edge, y2=edge, stroke="#8a919c"))
    parts.append(el("line", y1=margin, y2=margin + side, x1=edge, x2=edge, stroke="#8a919c"))
    whole = round(margin + side + 4)
    svg = el("svg", *parts, viewBox=f"0 0 {whole} {whole}", style=f"width:{whole}px;font-size:{font}px", role="img",
             aria_label="confusion matrix")  # fmt: skip
    return el("div", svg, class_="scroll matrix")


def _shade(share: float) -> str:
    """Return a colour between white (0) and dark blue (1)."""
    return "#{:02x}{:02x}{:02x}".format(*(round(255 + (end - 255) * share) for end in (16, 78, 139)))


def _cut(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"
