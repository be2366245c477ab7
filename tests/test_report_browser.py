"""The report in a real browser: it is drawn, its pictures decode, its tables sort, and nothing else is asked for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from tests.unit.report_cases import make_run
from util.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1000,900 "
    "--virtual-time-budget=5000"
).split()
# Looks at the page once everything is there, sorts the classes by AP, and leaves what it saw in the title.
LOOK = """
<script>
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#classes tbody tr")];
  const column = () => rows().map(r => parseFloat(r.cells[2].dataset.value));
  const head = document.querySelectorAll("#classes th")[2];
  head.click(); const down = column();
  head.click(); const up = column();
  const box = e => e.getBoundingClientRect();
  document.title = JSON.stringify({
    images: [...document.images].map(i => [i.complete, i.naturalWidth, box(i).width]),
    charts: [...document.querySelectorAll("figure.chart svg")].map(s => [box(s).width, box(s).height]),
    lines: [...document.querySelectorAll("figure.chart path")].map(p => p.getTotalLength()),
    matrix: document.querySelectorAll("#confusion rect").length,
    menu: [...document.querySelectorAll("nav a")].every(a => document.querySelector(a.getAttribute("href"))),
    down, up, wide: document.documentElement.scrollWidth - innerWidth,
    requests: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    background: getComputedStyle(document.querySelector("section")).backgroundColor,
  });
});
</script>
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """What the browser found on the page."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    folder = tmp_path_factory.mktemp("browser")
    page = write_report(make_run(folder / "run"), folder / "report.html", images_of_each=2)
    watched = folder / "watched.html"
    watched.write_text(page.read_text(encoding="utf-8").replace("</body>", LOOK + "</body>"), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", watched.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, encoding="utf-8", errors="replace")
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, f"the page did not finish, exit code {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(unescape(title.group(1)))


def test_pictures_are_decoded_and_shown(seen):
    assert len(seen["images"]) == 4
    assert all(complete and natural > 100 and shown > 100 for complete, natural, shown in seen["images"])


def test_charts_are_drawn(seen):
    assert len(seen["charts"]) >= 6
    assert all(width > 200 and height > 100 for width, height in seen["charts"])
    assert seen["lines"] and all(length > 10 for length in seen["lines"])
    assert seen["matrix"] > 3


def test_styles_apply_and_the_menu_leads_somewhere(seen):
    assert seen["background"] == "rgb(255, 255, 255)"
    assert seen["menu"] is True


def test_a_click_on_a_header_sorts_the_table(seen):
    assert len(seen["down"]) == 3 and len(set(seen["down"])) > 1
    assert seen["down"] == sorted(seen["down"], reverse=True)
    assert seen["up"] == sorted(seen["up"])


def test_the_page_fits_its_window_and_asks_for_nothing(seen):
    assert seen["wide"] <= 0
    assert seen["requests"] == []
