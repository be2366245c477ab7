"""HTML by small functions: text is escaped unless it was made here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Html(str):
    """Finished HTML. Any other text is escaped when it becomes part of an element."""

    __slots__ = ()


VOID = {"img", "meta", "line", "path", "rect", "circle"}  # elements without content


def el(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return an element; `class_` is the attribute `class`, `_` in names becomes `-`, None leaves one out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = join(children)
    return Html(f"<{name}{shown}/>" if name in VOID and not inside else f"<{name}{shown}>{inside}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    """Return the parts in a row; None is nothing, numbers and text are escaped."""
    return Html("".join(p if isinstance(p, Html) else escape(str(p)) for p in parts if p is not None))


def section(title: str, anchor: str, *children: Any) -> Html:
    """Return a part of the page that the menu can point at."""
    return el("section", el("h2", title), *children, id=anchor)


def note(text: str) -> Html:
    """Return a remark, for example why something is not here."""
    return el("p", text, class_="note")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, sortable: bool = False) -> Html:
    """Return a table in a box that scrolls by itself on narrow screens; numbers stand right.

    Args:
        sortable: a click on a header sorts, numbers by `data-value`. Cells may be `(shown, value)`.
    """
    rows = list(rows)
    body = [el("tr", *(_cell(value) for value in row)) for row in rows]
    right = [_is_number(value) for value in rows[0]] if rows else [False] * len(header)
    kinds = ["number" if number else None for number in right]
    head = el("tr", *(el("th", name, scope="col", class_=kind) for name, kind in zip(header, kinds)))
    inside = el("table", el("thead", head), el("tbody", *body), class_="sortable" if sortable else None)
    return el("div", inside, class_="scroll")


def _cell(value: Any) -> Html:
    shown, number = value if isinstance(value, tuple) else (value, value)
    if _is_number(value):
        return el("td", shown, class_="number", data_value=number)
    return el("td", shown)


def _is_number(value: Any) -> bool:
    return isinstance(value[1] if isinstance(value, tuple) else value, (int, float))


def percent(value: float | None) -> tuple[str, float]:
    """Return a cell of a share in percent; below 0 or None it is not defined."""
    return ("-", -1.0) if value is None or value < 0 else (f"{100 * value:.1f}", value)
