"""Correspondences are stored as the matcher finds them, survive resumed runs, and are drawn so that health is seen."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model
from tests.tiny import make_target, tiny_args
from tests.unit.soft_cases import found_by, output_of, random_predictions, random_target, request_of, soft_criterion
from util import correspondence_plot
from util.correspondence import Correspondences, Snapshot, read_snapshots, write_snapshot
from util.correspondence_plot import draw_correspondence, evenly, order_of_columns
from util.errors import UserError
from util.structures import SupervisedSet, Supervision

C = np.array([[0.10, 0.80, 0.10, 0.000, 0.000], [0.70, 0.20, 0.05, 0.049, 0.001], [0.02, 0.60, 0.00, 0.380, 0.000]])


def snapshot(epoch: int = 0, chosen: tuple[int, ...] = (1, 0, 1), optimal: tuple[int, ...] = (1, 4, 3)) -> Snapshot:
    """Return one image of three objects and five queries on two layers, the first of which is empty."""
    c, s = np.zeros((2, 3, 5), np.float16), np.zeros((2, 3, 5), np.float16)
    c[1] = C
    for row, query in enumerate(chosen):
        s[1, row, query] = query >= 0
    boxes = np.array([[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.3, 0.2], [0.5, 0.2, 0.1, 0.1]])
    return Snapshot(epoch, 7, np.arange(2), np.array([0, 1, 0]), boxes, c, s, np.stack([np.full(3, -1), optimal]))


def small_set(**objects: int) -> SimpleNamespace:
    """Return a data set of grey images with so many objects each, named `i` and their id."""
    ids = {int(name[1:]): count for name, count in objects.items()}
    annotations = {i: [{"iscrowd": 0}] * count + [{"iscrowd": 1}] for i, count in ids.items()}
    return SimpleNamespace(
        image_ids=list(ids),
        class_names=["dog", "cat", "hat", "mat"],
        coco=SimpleNamespace(imgToAnns=annotations),
        load_image=lambda index: Image.new("RGB", (64, 48), "gray"),
    )


def pictures_of(monkeypatch) -> list[list[int]]:
    """Return a list that will get the epochs of every picture."""
    drawn = []

    def remember(snapshots, image, names, path):
        drawn.append([s.epoch for s in snapshots])
        return path

    monkeypatch.setattr(correspondence_plot, "draw_correspondence", remember)
    return drawn


# what is seen


@pytest.mark.parametrize(
    ("flags", "matcher"),
    [("", "soft"), ("", "soft-literal"), ("--probe_per_layer --layer_consistency last --scg rounds", "soft")],
)
def test_what_is_seen_is_what_the_matcher_finds(flags: str, matcher: str) -> None:
    criterion, predictions = soft_criterion(flags, matcher), random_predictions(layers=2, images=2)
    targets = [replace(random_target(3), image_id=5), replace(random_target(2, seed=4), image_id=9)]
    watched = Correspondences(criterion, small_set(i5=3, i9=2), 2)
    watched.see(output_of(predictions), targets)
    first, second = watched.take(epoch=3)
    found = found_by(criterion.eval().assigners["queries"], request_of(predictions, targets))
    c, s = (x.detach().unflatten(0, (2, 2)).numpy() for x in (found.c, found.weights))
    np.testing.assert_allclose(first.c, c[:, 0, :3], atol=1e-3)
    np.testing.assert_allclose(second.s, s[:, 1, :2], atol=1e-3)
    assert (second.epoch, second.image_id, second.layers.tolist()) == (3, 9, [0, 1])
    logged = criterion(output_of(predictions), targets).terms
    mean = (3 * first.agree() + 2 * second.agree()) / 5, (3 * first.distinct() + 2 * second.distinct()) / 5
    assert mean == pytest.approx((logged["agree"].item(), logged["distinct"].item()))
    assert watched.take(epoch=4) == []


def test_layers_that_are_taught_in_different_ways_come_in_their_order() -> None:
    predictions, target = random_predictions(layers=3, images=1), replace(random_target(2), image_id=5)
    ways = (Supervision(layers=range(2, 3)), Supervision(layers=range(2), repeat=3))
    output = output_of(predictions)
    output.sets["one2one"] = SupervisedSet(predictions, ways)
    watched = Correspondences(soft_criterion(), small_set(i5=2), 1)
    watched.see(output, [target])
    (seen,) = watched.take(0)
    assert seen.layers.tolist() == [0, 1, 2]
    pairs = (seen.s > 0).sum(2)
    assert pairs[:2].max() > 1 and pairs.max() <= 3 and pairs[2].max() <= 2


def test_without_auxiliary_losses_only_the_last_layer_is_asked() -> None:
    watched = Correspondences(soft_criterion("--no_aux_loss"), small_set(i5=1), 1)
    watched.see(output_of(random_predictions(layers=3, images=1)), [replace(random_target(1), image_id=5)])
    assert watched.take(0)[0].layers.tolist() == [2]


def test_more_objects_than_queries_leave_some_without_an_optimal_one() -> None:
    watched = Correspondences(soft_criterion(), small_set(i5=6), 1)
    watched.see(output_of(random_predictions(layers=1, images=1, slots=4)), [replace(random_target(6), image_id=5)])
    assert sorted(watched.take(0)[0].optimal[0]) == [-1, -1, 0, 1, 2, 3]


def test_images_with_several_objects_are_watched_first_and_empty_ones_never() -> None:
    watched = Correspondences(soft_criterion(), small_set(i1=1, i2=0, i3=2, i4=5), 3)
    assert watched.image_ids == [3, 4, 1]
    watched.see(
        output_of(random_predictions(images=2)), [make_target(image_id=3), replace(random_target(2), image_id=2)]
    )
    assert watched.take(0) == []


def test_measures_are_those_of_the_last_layer() -> None:
    assert snapshot().distinct() == pytest.approx(2 / 3)
    assert snapshot().agree() == pytest.approx(1 / 3)
    unassigned = snapshot(chosen=(1, -1, -1), optimal=(1, -1, 3))
    assert unassigned.chosen().tolist() == [1, -1, -1]
    assert unassigned.agree() == pytest.approx(1 / 3)  # no query on both sides is no agreement


# what is stored


def test_a_snapshot_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    path = write_snapshot(snapshot(epoch=12), tmp_path / "new" / "image_7")
    assert path.name == "epoch_0012.npz"
    (back,) = read_snapshots(path.parent)
    assert (back.epoch, back.image_id) == (12, 7)
    for name in ("layers", "labels", "boxes", "c", "s", "optimal"):
        np.testing.assert_array_equal(getattr(back, name), getattr(snapshot(), name))
    assert path.stat().st_size < 4000


def test_an_epoch_that_is_done_twice_has_the_later_entry(tmp_path: Path) -> None:
    for epoch, chosen in ((1, (0, 0, 0)), (0, (1, 1, 1)), (1, (2, 2, 2))):
        write_snapshot(snapshot(epoch, chosen), tmp_path)
    assert [(s.epoch, s.chosen()[0]) for s in read_snapshots(tmp_path)] == [(0, 1), (1, 2)]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "image_7").write_text("a file")
    with pytest.raises(UserError, match=r"--plot_correspondence: cannot write .*epoch_0000"):
        write_snapshot(snapshot(), tmp_path / "image_7")


def test_a_picture_goes_on_from_earlier_epochs_and_leaves_out_later_ones_and_other_images(
    tmp_path: Path, monkeypatch
) -> None:
    watched = Correspondences(soft_criterion(), small_set(i7=3), 1)
    drawn = pictures_of(monkeypatch)
    monkeypatch.setattr(watched, "take", lambda epoch: [snapshot(epoch)])
    moved = replace(snapshot(1), boxes=snapshot().boxes + 0.1)
    for old in (snapshot(0), moved, snapshot(5)):
        write_snapshot(old, tmp_path / "image_7")
    assert watched.finish(2, tmp_path) == [tmp_path / "image_7.png"]
    assert drawn == [[0, 2]]


def test_without_matplotlib_the_data_is_stored_and_the_way_out_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    watched = Correspondences(soft_criterion(), small_set(i7=3), 1)
    monkeypatch.setattr(watched, "take", lambda epoch: [snapshot(epoch), replace(snapshot(epoch), image_id=8)])
    watched.dataset.image_ids = [7, 8]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert watched.finish(0, tmp_path) == []
    assert capsys.readouterr().out.count("no pictures of correspondences: curves need matplotlib: pip install") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"image_7", "image_8"}


def test_a_folder_that_cannot_be_written_stops_no_run(tmp_path: Path, monkeypatch, capsys) -> None:
    watched = Correspondences(soft_criterion(), small_set(i7=3), 1)
    monkeypatch.setattr(watched, "take", lambda epoch: [snapshot(epoch)])
    (tmp_path / "correspondence").write_text("a file")
    assert watched.finish(0, tmp_path / "correspondence") == []
    assert "no pictures of correspondences: --plot_correspondence: cannot write" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "told"), [(OSError("disk"), "OSError: disk"), (ValueError("odd"), "ValueError: odd")]
)
def test_a_picture_that_cannot_be_drawn_stops_no_run(tmp_path: Path, monkeypatch, capsys, error, told: str) -> None:
    def fail(*_):
        raise error

    watched = Correspondences(soft_criterion(), small_set(i7=3), 1)
    monkeypatch.setattr(watched, "take", lambda epoch: [snapshot(epoch)])
    monkeypatch.setattr(correspondence_plot, "draw_correspondence", fail)
    assert watched.finish(0, tmp_path) == []
    assert f"no pictures of correspondences: {told}" in capsys.readouterr().out
    assert [s.epoch for s in read_snapshots(tmp_path / "image_7")] == [0]


def test_a_damaged_file_of_an_earlier_epoch_stops_no_run(tmp_path: Path, monkeypatch, capsys) -> None:
    watched = Correspondences(soft_criterion(), small_set(i7=3), 1)
    monkeypatch.setattr(watched, "take", lambda epoch: [snapshot(epoch)])
    write_snapshot(snapshot(0), tmp_path / "image_7").write_bytes(b"half of a file")
    assert watched.finish(1, tmp_path) == []
    assert "no pictures of correspondences: " in capsys.readouterr().out


# what is drawn


def test_first_choices_come_first_in_the_order_of_their_objects() -> None:
    order, chosen = order_of_columns(C, np.eye(5)[[2, 4, 0]], np.array([2, 4, 0]))
    assert (order[:3], chosen) == ([2, 4, 0], 3)


def test_objects_with_one_query_share_its_column() -> None:
    order, chosen = order_of_columns(C, np.eye(5)[[1, 1, 1]], np.array([1, 4, 3]))
    # Query 2 has C of 0.1 and belongs to the first object; 4 is faint, but the optimal one of the second.
    assert (order, chosen) == ([1, 2, 0, 4, 3], 1)


def test_faint_queries_that_nobody_wants_have_no_column() -> None:
    order, _ = order_of_columns(C, np.eye(5)[[1, 0, 1]], np.array([1, 0, 3]))
    assert order == [1, 0, 2, 3]


def test_second_choices_follow_the_first_ones() -> None:
    weights = np.array([[0.0, 0.6, 0.4, 0, 0], [1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    order, chosen = order_of_columns(C, weights, np.array([-1, -1, -1]))
    assert (order, chosen) == ([1, 0, 2, 3], 3)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (3, [0, 1, 2]), (8, list(range(8))), (15, [0, 2, 4, 6, 8, 10, 12, 14])]
)
def test_the_first_and_the_last_epoch_are_always_drawn(count: int, expected: list[int]) -> None:
    assert evenly(count, 8) == expected


@pytest.mark.parametrize(("epochs", "objects"), [(1, 1), (5, 3), (12, 40)])
def test_a_picture_is_written_for_any_number_of_epochs_and_objects(tmp_path: Path, epochs: int, objects: int) -> None:
    generator = np.random.default_rng(0)
    snapshots = []
    for epoch in range(epochs):
        c = generator.random((1, objects, 50)).astype(np.float16)
        s = np.where(c == c.max(2, keepdims=True), 1, 0) * (np.arange(objects)[:, None] % 3 < 2)
        boxes, labels = np.full((objects, 4), 0.4), np.zeros(objects, int)
        optimal = np.arange(objects)[None]
        snapshots.append(Snapshot(epoch, 7, np.arange(1), labels, boxes, c, s, optimal))
    path = tmp_path / "image_7.png"
    image = Image.new("RGB", (64, 48), "gray")
    assert draw_correspondence(snapshots, image, ["person"] * objects, path) == path
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100  # not an empty page
    assert pixels.shape[1] > (1400 if epochs > 1 else 700)


def test_an_image_whose_objects_have_no_query_at_all_is_drawn(tmp_path: Path) -> None:
    nothing = snapshot(chosen=(-1, -1, -1), optimal=(-1, -1, -1))
    draw_correspondence([nothing], Image.new("RGB", (64, 48)), ["a", "b", "a"], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


# what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--plot_correspondence 2", "--plot_correspondence 2: --matcher hungarian learns no .*; add --matcher soft"),
        ("--plot_correspondence 1 --matcher cost-greedy", "--matcher cost-greedy learns no correspondences"),
        ("--plot_correspondence 2 --matcher soft", "draws into --output_dir: give one"),
        (
            "--plot_correspondence 2 --matcher soft --analyse discriminability --resume a.pth --output_dir out",
            "leave out --plot_correspondence, or use --eval",
        ),
        ("--plot_correspondence -1", "--plot_correspondence -1: must be 0 or more"),
    ],
)
def test_impossible_flags_are_refused_with_the_way_out(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(tiny_args(flags))


def test_looking_changes_nothing() -> None:
    criterion = soft_criterion()
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    state = torch.get_rng_state()
    watched = Correspondences(criterion, small_set(i5=3), 1)
    predictions = random_predictions(images=1, grad=True)
    watched.see(output_of(predictions), [replace(random_target(3), image_id=5)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())
    assert all(p.grad is None for p in criterion.parameters())
