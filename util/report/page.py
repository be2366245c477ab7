"""The page around the sections: one file without any request to another one."""

from __future__ import annotations

from collections.abc import Sequence

from util.report.html import Html, el, join

# Nothing may be loaded from anywhere, whatever the text of a run says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = Html("""
:root { --ink:#1d2430; --soft:#5d6675; --line:#e3e6ec; --paper:#fff; --back:#f5f6f9; --blue:#104e8b; }
* { box-sizing:border-box; }
html { scroll-behavior:smooth; scroll-padding-top:3.2rem; }
body { margin:0; background:var(--back); color:var(--ink); font:15px/1.5 system-ui,"Segoe UI",Roboto,Helvetica,Arial,
  sans-serif; }
header, main, footer { max-width:1140px; margin:0 auto; padding:0 1rem; }
main { padding-top:1px; }
header { padding-top:1.6rem; }
h1 { font-size:1.7rem; margin:0; overflow-wrap:anywhere; }
h2 { font-size:1.2rem; margin:0 0 .8rem; }
h3 { font-size:1rem; margin:1.2rem 0 .5rem; }
header p, footer { color:var(--soft); overflow-wrap:anywhere; }
footer { padding-bottom:2rem; }
nav { position:sticky; top:0; z-index:1; background:var(--paper); border-bottom:1px solid var(--line);
  margin-top:1rem; }
nav div { max-width:1140px; margin:0 auto; padding:.55rem 1rem; display:flex; gap:.3rem 1.2rem; flex-wrap:wrap; }
a { color:var(--blue); text-decoration:none; } a:hover { text-decoration:underline; }
section { background:var(--paper); border:1px solid var(--line); border-radius:10px; padding:1.1rem 1.2rem;
  margin:1.1rem 0; }
.tiles { display:flex; flex-wrap:wrap; gap:.7rem; margin:1.1rem 0 0; }
.tiles div { background:var(--paper); border:1px solid var(--line); border-radius:10px; padding:.55rem 1rem;
  min-width:6.5rem; }
.tiles b { display:block; font-size:1.45rem; line-height:1.3; } .tiles span { color:var(--soft); font-size:.85rem; }
.grid { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr)); gap:1rem; }
.wide { grid-template-columns:repeat(auto-fill,minmax(min(460px,100%),1fr)); }
figure { margin:0; min-width:0; } figcaption { font-weight:600; font-size:.92rem; margin-bottom:.25rem; }
figure img { width:100%; height:auto; display:block; border:1px solid var(--line); border-radius:6px; }
svg { width:100%; height:auto; font-size:11px; fill:var(--soft); font-family:inherit; }
.matrix svg { max-width:none; }
.beside { display:flex; flex-wrap:wrap; gap:0 2.5rem; } .beside > * { max-width:100%; }
.legend { display:flex; flex-wrap:wrap; gap:.1rem .9rem; font-size:.8rem; color:var(--soft); padding-left:2.6rem; }
.legend i { display:inline-block; width:1.3rem; vertical-align:middle; margin-right:.35rem; }
.pictures figure { cursor:zoom-in; } .pictures figure:focus { grid-column:1 / -1; outline:none; cursor:auto; }
.scroll { overflow-x:auto; } .tall .scroll { max-height:32rem; overflow-y:auto; scrollbar-gutter:stable; }
table { border-collapse:collapse; font-size:.9rem; }
th, td { padding:.3rem .75rem; text-align:left; vertical-align:top; }
th { border-bottom:2px solid var(--line); font-weight:600; white-space:nowrap; background:var(--paper); }
.tall th { position:sticky; top:0; }
td { border-bottom:1px solid var(--line); max-width:40rem; overflow-wrap:break-word; }
td:first-child { white-space:nowrap; }
td:not(.number):not(:first-child) { min-width:8rem; }
.number { text-align:right; } td.number { font-variant-numeric:tabular-nums; white-space:nowrap; }
.sortable th { cursor:pointer; } .sortable th:hover { color:var(--blue); }
th[aria-sort=ascending]::after { content:" \\2191"; } th[aria-sort=descending]::after { content:" \\2193"; }
pre { background:var(--back); border-radius:6px; padding:.7rem .9rem; margin:0; white-space:pre-wrap;
  overflow-wrap:anywhere; font:13px/1.5 ui-monospace,Menlo,Consolas,monospace; }
summary { cursor:pointer; color:var(--blue); margin:.8rem 0 .5rem; }
.note { color:#75590c; background:#fdf6e0; border-radius:6px; padding:.5rem .8rem; margin:.4rem 0; font-size:.9rem; }
.hint { color:var(--soft); font-size:.87rem; margin:.2rem 0 .8rem; }
@media print { nav { display:none; } section { break-inside:avoid; } body { background:#fff; }
  .tall .scroll { max-height:none; } }
""")

SCRIPT = Html("""
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const cell = row => row.cells[column];
    const number = row => parseFloat(cell(row).dataset.value);
    const rows = [...table.tBodies[0].rows];
    const numeric = rows.every(row => !isNaN(number(row)));
    const first = numeric ? "descending" : "ascending", other = numeric ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    const sign = order === "ascending" ? 1 : -1;
    rows.sort((a, b) => sign * (numeric ? number(a) - number(b)
      : cell(a).textContent.localeCompare(cell(b).textContent, undefined, {numeric: true})));
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    table.tBodies[0].append(...rows);
  }));
}
""")


def page(title: str, subtitle: Html, tiles: Sequence[tuple[str, str]], sections: dict[str, Html], end: str) -> str:
    """Return the whole document.

    Args:
        tiles: (value, what it is) of the most important numbers.
        sections: by the word that stands for it in the menu; each has an `id`, made of that word by `anchor`.
    """
    menu = el("nav", el("div", *(el("a", word, href=f"#{anchor(word)}") for word in sections)), aria_label="sections")
    shown = el("div", *(el("div", el("b", value), el("span", what)) for value, what in tiles), class_="tiles")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("title", title),
        el("style", STYLE),
    )
    body = el(
        "body",
        el("header", el("h1", title), subtitle, shown if tiles else None),
        menu,
        el("main", *sections.values()),
        el("footer", end),
        el("script", SCRIPT),
    )
    return join([Html("<!doctype html>\n"), el("html", head, body, lang="en")]) + "\n"


def anchor(word: str) -> str:
    """Return the `id` of a section."""
    return word.lower().replace(" ", "-")
