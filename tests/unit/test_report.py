"""The page about a run: everything the folder holds, nothing from elsewhere, and a word about what is missing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import main
from datasets.confusion import Confusion
from tests.unit.infer_cases import coco
from tests.unit.report_cases import make_run
from util.errors import UserError
from util.eval_curves import EvalCurves, PrecisionRecall, read_eval_curves
from util.report import sections, write_report
from util.report.charts import COLORS, Line, heat_map, line_chart
from util.report.html import Html, el, table
from util.report.page import SCRIPT, STYLE


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run <b>1 & more")


@pytest.fixture
def run(stored: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(stored, tmp_path / stored.name))


class Page(HTMLParser):
    """Elements that are open, ids and references of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.references, self.images = [], set(), [], 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.handle_startendtag(tag, attrs)
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id"))
        self.references += [given[name] for name in ("src", "href") if name in given]
        self.images += tag == "img"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report(run: Path, **options) -> str:
    return write_report(run, run / "report.html", **options).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """Return what is read on the page."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_the_command_writes_one_file_with_all_sections(run, capsys):
    assert main.main(["--report", str(run), "--report_images", "2"]) == 0
    assert f"wrote {run / 'report.html'}" in capsys.readouterr().out
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    present = {"results", "training", "classes", "precision", "confusion", "images", "settings", "files"}
    assert present <= page.ids and not page.open
    assert page.images == 4
    assert {r[1:] for r in page.references if r.startswith("#")} == present  # no matching health in this log


def test_nothing_is_loaded_from_elsewhere(run):
    page = report(run, images_of_each=1)
    for reference in Page(page).references:
        assert reference.startswith(("#", "data:image/jpeg;base64,")) or (run / reference).exists(), reference
    assert "default-src &#x27;none&#x27;" in page
    for forbidden in ("url(", "@import", "fetch(", "XMLHttpRequest", "http://", "https://"):
        assert forbidden not in STYLE + SCRIPT
    assert not re.search(r"(src|href)=\"https?:", page)


def test_numbers_and_settings_are_those_of_the_files(run):
    page = report(run, images_of_each=0)
    stats = json.loads((run / "eval" / "stats.json").read_text())
    text = text_of(page)
    assert f"{100 * stats['AP50']:.1f} AP50" in text
    assert "2 of 2 epochs" in text and "3 min of training" in text and "12.3 M parameters" in text
    assert "--hidden_dim 32 256" in text  # flag, value, default
    assert "--enc_n_points" not in text  # as by default
    point = read_eval_curves(run / "eval").points[0]
    assert f"{point.name} {point.objects}" in text and f"{100 * point.precision:.1f}" in text
    assert "torch: 2.9" in text and "command: old" not in text


def test_text_of_the_run_cannot_become_markup(run):
    changed = json.loads((run / "args.json").read_text()) | {"resume": '"><script>alert(1)</script>'}
    (run / "args.json").write_text(json.dumps(changed))
    page = report(run, images_of_each=0)
    assert "<title>run &lt;b&gt;1 &amp; more</title>" in page
    assert "alert(1)</script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "--note &#x27;&lt;b&gt;&#x27;" in page


def test_images_are_sorted_by_their_f1(run):
    shown = [float(f1) for f1 in re.findall(r"<figcaption>image \d+: F1 ([\d.]+)", report(run, images_of_each=3))]
    assert len(shown) == 6
    assert shown[:3] == sorted(shown[:3]) and shown[3:] == sorted(shown[3:], reverse=True)
    assert max(shown[:3]) <= min(shown[3:])


def test_without_the_data_the_report_says_so_and_keeps_the_stored_curves(run):
    complete = report(run, images_of_each=1)
    gone = {"dataset_file": "coco", "coco_path": "/no/such/folder"}
    (run / "args.json").write_text(json.dumps(json.loads((run / "args.json").read_text()) | gone))
    page = report(run, images_of_each=1)
    assert "images are not at hand (--coco_path /no/such/folder is not a folder" in text_of(page)
    parsed = Page(page)
    assert parsed.images == 0 and {"confusion", "precision", "classes"} <= parsed.ids
    matrix = re.compile(r'aria-label="confusion matrix".*?</svg>', re.DOTALL)
    assert matrix.search(page).group() == matrix.search(complete).group()


def coco_run(folder: Path) -> Path:
    """Write a run that was evaluated on three image files, with category ids that float32 does not hold."""
    annotations = coco(folder)
    data = json.loads(annotations.read_text())
    for entry, name in [(c, "id") for c in data["categories"]] + [(a, "category_id") for a in data["annotations"]]:
        entry[name] += 2**24 + 2
    annotations.write_text(json.dumps(data))
    found = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in data["annotations"]]
    (folder / "run" / "eval").mkdir(parents=True)
    (folder / "run" / "eval" / "results.json").write_text(json.dumps(found))
    args = {"val_images": str(folder), "val_json": str(annotations)}
    (folder / "run" / "args.json").write_text(json.dumps(args))
    return folder / "run"


def test_category_ids_may_be_large(tmp_path):
    assert Page(report(coco_run(tmp_path))).images == 2


def test_a_report_without_one_of_its_image_files_says_so(tmp_path):
    run = coco_run(tmp_path)
    (tmp_path / "3.png").unlink()
    text = text_of(report(run))
    assert "Images are missing here" in text and "3.png" in text and "Settings" in text


def test_without_data_and_curves_the_rest_is_there(run):
    (run / "args.json").unlink()
    (run / "eval" / "confusion.csv").unlink()
    page = report(run)
    assert "There is no args.json here" in page and "Nor are there tables of curves" in page
    assert {"results", "training", "classes", "files"} <= Page(page).ids and 'id="confusion"' not in page


def test_a_training_that_was_never_evaluated_has_a_report(run):
    shutil.rmtree(run / "eval")
    (run / "log.txt").write_text('{"epoch": 0, "train_loss": 3.0}\n')
    text = text_of(report(run))
    assert "Nothing was evaluated yet." in text and "total loss" in text


def test_an_evaluation_without_training_has_a_report(run):
    (run / "log.txt").unlink()
    (run / "args.json").rename(run / "eval_args.json")
    page = report(run, images_of_each=1)
    assert "no training curves" in page and Page(page).images == 2 and 'id="training"' not in page


def test_an_evaluation_after_the_training_brings_its_own_data(run):
    args = json.loads((run / "args.json").read_text())
    (run / "eval_args.json").write_text(json.dumps(args))
    (run / "args.json").write_text(json.dumps(args | {"synthetic_val": 1}))
    assert Page(report(run, images_of_each=1)).images == 2


def test_health_of_matching_is_shown_where_the_log_has_it(run):
    entry = {"epoch": 0, "train_loss": 3.0, "train_unassigned_unscaled": 0.1, "train_agree_unscaled": 0.7}
    (run / "log.txt").write_text(json.dumps(entry) + "\n")
    text = text_of(report(run, images_of_each=0))
    assert "objects without a query (unassigned)" in text and "above 0.02: too many" in text
    assert "surplus detections" not in text


def test_averaged_weights_and_the_best_epoch_have_columns(run):
    numbers = [[0.5] * 12, [0.25] * 12]
    entries = [
        {"epoch": i, "test_coco_eval_bbox": n, "ema_test_coco_eval_bbox": [0.75] * 12} for i, n in enumerate(numbers)
    ]
    (run / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (run / "eval" / "stats.json").unlink()
    text = text_of(report(run, images_of_each=0))
    assert "stored evaluation best, epoch 1 averaged weights AP 25.0 50.0 75.0" in re.sub(r" +", " ", text)


def test_the_report_needs_no_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'aria-label="average precision"' in report(run, images_of_each=0)


@pytest.mark.parametrize(("name", "message"), [("absent", "there is no such folder"), ("empty", "no epoch in log.txt")])
def test_a_folder_without_a_run_is_refused(name, message, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        write_report(tmp_path / name, tmp_path / "report.html")


def test_a_place_that_cannot_be_written_is_told(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another folder with --output_dir"):
        write_report(run, tmp_path / "file" / "report.html", images_of_each=0)


# ---- parts ----


def test_text_is_escaped_and_finished_html_is_not():
    assert (
        el("p", "a<b", el("b", "c"), None, 3, class_="x", data_value='"')
        == '<p class="x" data-value="&quot;">a&lt;b<b>c</b>3</p>'
    )
    assert isinstance(el("p"), Html)


def test_numbers_of_a_table_can_be_sorted_by_their_value():
    assert '<td class="number" data-value="0.125">12.5</td>' in table(["a", "b"], [("x", ("12.5", 0.125))])


def test_a_line_goes_through_its_points_and_skips_what_is_no_number():
    chart = line_chart("loss", [Line("a", [1, 2, 3], [0.0, float("nan"), 1.0], COLORS[0])], "epoch", y_range=(0, 1))
    assert 'd="M46.0,210.0L390.0,8.0"' in chart  # the lower left and the upper right corner
    assert "a 3: 1" in chart and chart.count("<circle") == 2


def test_epochs_are_whole_numbers_on_the_axis():
    chart = line_chart("loss", [Line("a", [1, 2], [0.0, 1.0], COLORS[0])], "epoch")
    assert re.findall(r'text-anchor="middle">([^<]*)<', chart) == ["1", "2", "epoch"]


@pytest.mark.parametrize("values", [[], [float("nan")], [0.0, -1.0]])
def test_a_chart_without_values_says_so(values):
    assert "no values" in line_chart("lr", [Line("a", range(len(values)), values, COLORS[0])], "epoch", log=True)


def test_cells_of_the_matrix_say_what_they_count():
    picture = heat_map(["cat", "a<b"], np.array([[3, 1, 0], [0, 0, 2], [4, 0, 0]]))
    assert "cat as a&lt;b: 1 (25.0%)" in picture and "a&lt;b as missed: 2 (100.0%)" in picture
    assert "background as cat: 4 (100.0%)" in picture and picture.count("<title>") == 4


def many_classes(classes: int) -> EvalCurves:
    names = [f"class {i}" for i in range(classes)]
    counts = np.eye(classes + 1, dtype=np.int64)
    counts[0, 1] = 5
    curves = {name: np.full(101, i / classes) for i, name in enumerate(names)}
    nothing = np.zeros(101)
    return EvalCurves(PrecisionRecall(nothing, nothing, nothing, curves), [], Confusion(names, counts, 0.5), None)


def test_too_many_classes_for_a_matrix_are_listed():
    shown = sections.confusions(many_classes(101))
    assert "101 classes are too many for a picture" in shown and "<svg" not in shown
    assert "<td>class 0</td><td>class 1</td>" in shown
    assert "<svg" in sections.confusions(many_classes(100))


def test_of_many_classes_the_best_and_the_worst_are_named():
    shown = text_of(sections.precision_recall(many_classes(1203)))
    assert "the best and worst 5" in shown and "class 1202 0.999" in shown and "class 0 0.000" in shown
    assert "class 600" not in shown
