"""Pictures of assignments: the pairs of every scheme and layer, found without a trace in the training."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_criterion, build_model
from tests.cli import run
from tests.test_resume import assert_same_run
from tests.tiny import TWO_STAGE, make_target, tiny_args, tiny_images
from util.assignment_plot import draw_assignment
from util.assignments import Assignments, Pairs, pairs_of, read_pairs
from util.boxes import cxcywh_to_xyxy
from util.errors import UserError
from util.structures import Assignment, DetectorOutput, Predictions, SupervisedSet, Supervision

TARGET = make_target([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.4, 0.2]], [1, 3], image_id=7)
ATSS = "--aux_heads atss --num_feature_levels 3"
SIDE = 128  # pixels: the coarsest level has 2 x 2 cells
BRANCH = f"{TWO_STAGE} --num_queries 6 --num_queries_one2many 8 --k_one2many 3"
DINO = f"{TWO_STAGE} --query_pos box --dn_number 50"


def one_image_set(target=TARGET, ids: tuple[int, ...] = (7,)) -> SimpleNamespace:
    """Return a data set whose images all look the same, with the objects of `target`."""
    pixels = tiny_images(((SIDE, SIDE),)).pixels[0]
    corners = SIDE * cxcywh_to_xyxy(target.boxes)

    class Set(SimpleNamespace):
        def __getitem__(self, index: int):
            sample = {"image_id": ids[index], "boxes": corners, "labels": target.labels, "orig_size": (SIDE, SIDE)}
            return pixels, sample | {"iscrowd": torch.zeros(len(target)), "area": torch.ones(len(target))}

    return Set(
        image_ids=list(ids),
        class_names=["dog", "cat", "hat", "mat"],
        coco=SimpleNamespace(imgToAnns={i: [{"iscrowd": 0}] * len(target) for i in ids}),
        load_image=lambda index: Image.new("RGB", (SIDE, SIDE), "gray"),
    )


def look(flags: str, epoch: int = 0) -> Pairs:
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_args(flags))
    (pairs,) = Assignments(criterion, one_image_set(), 1).look(model, epoch, torch.device("cpu"))
    return pairs


def counts(pairs: Pairs, name: str) -> list[int]:
    """Return the number of pairs of a group on each layer."""
    depth = int(pairs.depth[pairs.groups.tolist().index(name)])
    return [len(pairs.of(name, layer)) for layer in range(1, depth + 1)]


# which pairs


def predicted(layers: int) -> Predictions:
    """Return five queries, all far from the objects and sure of no class."""
    return Predictions(torch.full((layers, 1, 5, 4), -4.0), torch.full((layers, 1, 5, 4), 0.05))


def known_pairs() -> Pairs:
    """Return pairs of queries that predict the objects: 3 and 1 on layer 1, 3 and 4 on layer 2, 0 and 2 of `dn`."""
    found, noised = predicted(2), predicted(2)
    for layer, slots in enumerate(((3, 1), (3, 4))):
        for slot, box, label in zip(slots, TARGET.boxes, TARGET.labels):
            found.boxes[layer, 0, slot] = box
            found.logits[layer, 0, slot, label] = 2.0
    slot, layer, target = torch.tensor([0, 2, 0, 2]), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 1, 0])
    ready = Assignment(layer, torch.zeros_like(slot), slot, target, weight=torch.tensor([1.0, 0.5, 1.0, 0.0]))
    sets = {"one2one": SupervisedSet(found, (Supervision(),)), "dn": SupervisedSet(noised, (Supervision(ready),))}
    output, criterion = DetectorOutput(sets), build_criterion(tiny_args())
    return pairs_of(output, TARGET, criterion.pairs(output, [TARGET]), epoch=2)


def test_pairs_are_those_of_the_matcher_and_the_fixed_ones_by_layer() -> None:
    pairs = known_pairs()
    assert pairs.groups.tolist() == ["one2one", "dn"] and pairs.ready.tolist() == [False, True]
    rows = list(zip(pairs.group.tolist(), pairs.layer.tolist(), pairs.query.tolist(), pairs.object.tolist()))
    assert sorted(rows) == [
        (0, 1, 1, 1),
        (0, 1, 3, 0),
        (0, 2, 3, 0),
        (0, 2, 4, 1),
        (1, 1, 0, 1),
        (1, 1, 2, 0),
        (1, 2, 0, 1),  # the other pair has weight 0
    ]
    own = pairs.of("one2one", 2)
    np.testing.assert_allclose(pairs.box[own], TARGET.boxes.numpy()[pairs.object[own]])
    np.testing.assert_allclose(pairs.iou[own], 1, rtol=1e-5)
    np.testing.assert_allclose(pairs.score[own], 1 / (1 + np.exp(-2.0)), rtol=1e-5)
    assert sorted(pairs.weight[pairs.of("dn", 1)]) == [0.5, 1]
    assert pairs.queries.tolist() == [5, 5] and pairs.depth.tolist() == [2, 2]


def test_an_object_has_changed_when_it_has_other_queries_than_on_the_layer_before() -> None:
    pairs = known_pairs()
    assert pairs.changed("one2one", 2) == 1
    assert pairs.changed("dn", 2) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"one2one": [2, 2]}),
        ("--no_aux_loss", {"one2one": [0, 2]}),
        ("--matcher cost-greedy", {"one2one": [2, 2]}),
        ("--matcher soft --scg rounds", {"one2one": [2, 2]}),
        (BRANCH, {"one2one": [2, 2], "one2many": [6, 6], "encoder": [2]}),
        (f"{BRANCH} --num_queries_one2many 9 --one2many_groups isolated", {"one2many": [6, 6]}),
        (f"{BRANCH} --one2many_own encoder", {"encoder_one2many": [2]}),
        ("--hybrid layer --hybrid_k 3 --hybrid_layers 1", {"one2one": [6, 2]}),
        (f"{TWO_STAGE} --enc_matcher cost-greedy", {"encoder": [2]}),
    ],
)
def test_every_scheme_shows_its_pairs(flags: str, expected: dict[str, list[int]]) -> None:
    pairs = look(flags)
    assert {name: counts(pairs, name) for name in expected} == expected
    assert not pairs.ready.any()
    # A slot learns one object at most.
    rows = list(zip(pairs.group.tolist(), pairs.layer.tolist(), pairs.query.tolist()))
    assert len(rows) == len(set(rows))


def test_a_schedule_by_epoch_is_followed() -> None:
    flags = "--hybrid epoch --hybrid_k 4 --epochs 4 --hybrid_rho 0.5"
    assert [counts(look(flags, epoch), "one2one") for epoch in (1, 2)] == [[8, 8], [2, 2]]


def test_denoising_queries_have_fixed_pairs_and_always_the_same_noise() -> None:
    pairs, again = look(DINO), look(DINO, epoch=1)
    assert counts(pairs, "dn") == [50, 50] and pairs.ready[pairs.groups.tolist().index("dn")]
    assert pairs.queries[pairs.groups.tolist().index("dn")] == 100
    own = pairs.of("dn", 1)
    assert np.bincount(pairs.object[own]).tolist() == [25, 25]
    np.testing.assert_array_equal(pairs.box[own], again.box[own])


@pytest.mark.parametrize("fill", ["negatives", "masked"])
def test_the_positives_of_auxiliary_heads_have_fixed_pairs(fill: str) -> None:
    pairs = look(f"{ATSS} --aux_fill {fill}")
    first, last = counts(pairs, "co_atss")
    assert first == last > 0 and pairs.ready.tolist() == [False, True]
    assert first == pairs.queries[1] if fill == "masked" else first <= pairs.queries[1]


def test_a_learned_matcher_gives_weights() -> None:
    pairs = look("--matcher soft")
    for index in range(2):
        own = pairs.of("one2one", 2)
        assert pairs.weight[own][pairs.object[own] == index].sum() == pytest.approx(1, abs=1e-3)


# without a trace


@pytest.mark.parametrize("flags", [f"{DINO} {ATSS} --backbone_norm train --dropout 0.1", "--matcher soft"])
def test_looking_changes_neither_weights_nor_modes_nor_random_numbers(flags: str) -> None:
    model, criterion, _ = build_model(tiny_args(flags))
    model.train()
    criterion.train()
    model.backbone.eval()  # modes that differ are put back too
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in [*model.state_dict().items(), *criterion.state_dict().items()]}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert Assignments(criterion, one_image_set(), 1).look(model, 0, torch.device("cpu"))
    assert [module.training for module in model.modules()] == modes and criterion.training
    assert torch.equal(torch.get_rng_state(), torch_state) and np.random.get_state()[1].tolist() == numpy_state
    for name, value in [*model.state_dict().items(), *criterion.state_dict().items()]:
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


MORE = f"{DINO} --dropout 0.1 --backbone_norm train --synthetic_train 4 --synthetic_val 3 --no-eval_loss --use_ema"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A finished run of two epochs with denoising, two images drawn."""
    folder = tmp_path_factory.mktemp("drawn")
    assert run(folder, f"{MORE} --plot_assignment 2") == 0
    return folder


def test_a_run_stores_and_draws_its_epochs_and_is_the_same_run_bit_by_bit(drawn, tmp_path) -> None:
    folder = drawn / "assignment"
    images = sorted(path for path in folder.iterdir() if path.is_dir())
    assert len(images) == 2
    for image in images:
        found = read_pairs(image)
        assert [pairs.epoch for pairs in found] == [0, 1]
        assert found[0].groups.tolist()[:2] == ["one2one", "dn"] and f"image_{found[0].image_id}" == image.name
        assert image.with_suffix(".png").stat().st_size > 10_000
    assert run(tmp_path, MORE) == 0
    assert not (tmp_path / "assignment").exists()
    assert_same_run(drawn, tmp_path)


def test_a_checkpoint_is_drawn_in_an_evaluation(drawn) -> None:
    assert run(drawn, f"{MORE} --plot_assignment 1 --eval --resume {drawn}/checkpoint.pth") == 0
    (image,) = (path for path in (drawn / "assignment_eval").iterdir() if path.is_dir())
    (own,) = read_pairs(image)
    last = read_pairs(drawn / "assignment" / image.name)[-1]
    assert own.epoch == last.epoch == 1
    np.testing.assert_array_equal(own.query, last.query)
    np.testing.assert_allclose(own.box, last.box, atol=1e-5)


# what is drawn


def test_boxes_are_drawn_in_the_colour_of_their_object(tmp_path, monkeypatch) -> None:
    import matplotlib.axes

    drawn = []
    add = matplotlib.axes.Axes.add_patch
    monkeypatch.setattr(matplotlib.axes.Axes, "add_patch", lambda axes, p: drawn.append((axes, p)) or add(axes, p))
    draw_assignment(known_pairs(), Image.new("RGB", (200, 100)), ["cat", "mat"], tmp_path / "a.png")
    titles = [axes.get_title() for axes in dict.fromkeys(axes for axes, _ in drawn)]
    assert titles == [
        "image 7, epoch 3",
        "layer 1: 2 queries, IoU 1.00\n",
        "layer 2: 2 queries, IoU 1.00\n1 of 2 changed",
        "layer 1: 2 queries, IoU 0.00\n",
        "layer 2: 1 query, IoU 0.00\n1 without a query",
    ]
    first = next(axes for axes, _ in drawn if axes.get_title().startswith("layer 1: 2 queries, IoU 1.00"))
    patches = [p for axes, p in drawn if axes is first]
    dashed = [p for p in patches if p.get_linestyle() != "solid"]
    # The first object is (0.3, 0.4, 0.2, 0.3) of 200 x 100 pixels; its query predicts just that.
    assert [p.get_bbox().bounds for p in dashed] == [pytest.approx(b) for b in ((40, 25, 40, 30), (100, 50, 80, 20))]
    bright = [tuple(channel / 0.6 for channel in p.get_edgecolor()[:3]) for p in dashed]
    boxes = {p.get_edgecolor()[:3]: p.get_bbox().bounds for p in patches if p.get_linestyle() == "solid"}
    for colour, bounds in zip(bright, ((40, 25, 40, 30), (100, 50, 80, 20))):
        (own,) = (found for key, found in boxes.items() if key == pytest.approx(colour))
        assert own == pytest.approx(bounds)


def test_a_group_without_any_pair_is_drawn(tmp_path) -> None:
    pairs = look("--no_aux_loss")
    draw_assignment(pairs, Image.new("RGB", (64, 64)), ["cat", "mat"], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_what_cannot_be_drawn_is_told_and_the_training_goes_on(tmp_path, capsys, monkeypatch) -> None:
    model, criterion, _ = build_model(tiny_args())
    watched, device = Assignments(criterion, one_image_set(), 1), torch.device("cpu")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert watched.finish(model, 0, tmp_path, device, torch.no_grad()) == []
    assert "no pictures of assignments: curves need matplotlib" in capsys.readouterr().out
    assert (tmp_path / "image_7" / "epoch_0000.npz").is_file()
    (tmp_path / "file").touch()
    assert watched.finish(model, 0, tmp_path / "file", device, torch.no_grad()) == []
    assert "--plot_assignment: cannot write" in capsys.readouterr().out
    watched.image_ids = [99]
    assert watched.finish(model, 0, tmp_path, device, torch.no_grad()) == []
    assert "no pictures of assignments: ValueError" in capsys.readouterr().out


def test_an_image_without_objects_at_this_size_is_left_out() -> None:
    model, criterion, _ = build_model(tiny_args())
    dataset = one_image_set()
    none = one_image_set(make_target())
    watched = Assignments(criterion, dataset, 1)
    watched.dataset = none
    assert watched.image_ids == [7] and watched.look(model, 0, torch.device("cpu")) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--plot_assignment -1", "--plot_assignment -1: must be 0 or more"),
        ("--plot_assignment 2", "--plot_assignment 2 draws into --output_dir: give one"),
        (
            "--plot_assignment 2 --analyse attention --resume a.pth --output_dir out",
            "leave out --plot_assignment, or use --eval",
        ),
    ],
)
def test_impossible_flags_are_refused_with_the_way_out(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(tiny_args(flags))
