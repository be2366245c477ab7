"""Discriminability score: hand-computed maps, curves and splats; positives of every scheme; whole runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from models import build_model
from tests.cli import run
from tests.tiny import TWO_STAGE, make_target, tiny_args, tiny_images, tiny_targets
from util.analysis.attention import Samples, attention_of_positives, positives, sampling, splat, watch
from util.analysis.discriminability import THRESHOLDS, Curve, area, read_result, table
from util.analysis.maps import foreground, mean_of_levels, on_image, picture, valid_sizes
from util.checkpoint import read_checkpoint
from util.errors import UserError
from util.structures import Assignment, ImageBatch, Memory, Supervision

ONE2MANY = f"{TWO_STAGE} --num_queries_one2many 6 --k_one2many 2"
CO = "--aux_heads atss"


def memory_of(levels: list[torch.Tensor], valid: list[tuple[int, int]]) -> Memory:
    """Return a memory of one image with these maps (D, h, w), of which the first `valid` cells are image."""
    padding = []
    for level, (h, w) in zip(levels, valid):
        own = torch.ones(level.shape[-2:], dtype=torch.bool)
        own[:h, :w] = False
        padding.append(own.flatten())
    tokens = torch.cat([level.flatten(1).T for level in levels])[None]
    shapes = tuple(tuple(level.shape[-2:]) for level in levels)
    return Memory(tokens, torch.cat(padding)[None], shapes, torch.ones(1, len(levels), 2))


# maps on the image


def test_norms_are_divided_by_their_maximum_resized_and_averaged_over_levels() -> None:
    first = torch.tensor([[[3.0, 0.0], [6.0, 0.0]], [[4.0, 0.0], [8.0, 5.0]]])  # norms 5 0 / 10 5
    assert mean_of_levels([first.norm(dim=0)], [(2, 2)], (2, 2)).tolist() == [[0.5, 0.0], [1.0, 0.5]]
    second = torch.tensor([[7.0]])
    assert mean_of_levels([first.norm(dim=0), second], [(2, 2), (1, 1)], (2, 2)).tolist() == [[0.75, 0.5], [1.0, 0.75]]


def test_a_level_without_any_value_stays_zero() -> None:
    assert mean_of_levels([torch.zeros(2, 3)], [(2, 3)], (4, 6)).tolist() == torch.zeros(4, 6).tolist()


def test_maps_are_resized_bilinearly_between_the_centres_of_cells() -> None:
    resized = on_image(torch.tensor([[[0.0, 1.0]]]), (1, 2), (2, 4))
    assert resized.shape == (1, 2, 4)
    assert resized[0].tolist() == [[0.0, 0.25, 0.75, 1.0]] * 2


def test_what_lies_in_the_padding_never_counts() -> None:
    own = torch.rand(3, 4, 5)
    padded = torch.full((3, 6, 9), 1e6)
    padded[:, :4, :5] = own
    alone = memory_of([own, own[:, :2, :3]], [(4, 5), (2, 3)])
    batch = memory_of([padded, padded[:, :3, :4]], [(4, 5), (2, 3)])
    # The second level of `batch` has one more row and column, which belong to the padding.
    scores = []
    for memory in (alone, batch):
        assert valid_sizes(memory) == [[(4, 5), (2, 3)]]
        norms = [level[0].norm(dim=0) for level in memory.maps()]
        scores.append(mean_of_levels(norms, valid_sizes(memory)[0], (29, 37)))
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)
    assert scores[0].max() <= 1


def test_the_padding_of_a_real_batch_is_known_by_its_images() -> None:
    model = build_model(tiny_args())[0].eval()
    sizes = valid_sizes(model.encode(tiny_images([(64, 64), (48, 57)])))
    assert sizes == [[(8, 8), (4, 4), (2, 2), (1, 1)], [(6, 8), (3, 4), (2, 2), (1, 1)]]
    assert valid_sizes(model.encode(tiny_images([(48, 57)], canvas=(96, 128))))[0] == sizes[1]


def test_the_foreground_is_the_union_of_the_pixels_whose_centres_are_in_boxes() -> None:
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.25, 0.5, 0.5], [0.95, 0.95, 0.1, 0.1]])
    # The last box covers a tenth of the image up to its corner and no centre.
    assert foreground(boxes, (4, 4)).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert not foreground(boxes[:0], (4, 6)).any() and foreground(boxes[:0], (4, 6)).shape == (4, 6)


def test_a_picture_is_the_unpadded_image_with_its_colours() -> None:
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, :, :2, :3] = white[:, None, None]
    shown = picture(ImageBatch(pixels, torch.zeros(1, 4, 4, dtype=torch.bool), [(2, 3)]), 0)
    torch.testing.assert_close(shown, torch.ones(2, 3, 3))


def test_a_picture_of_a_batch_as_loaded_has_its_colours_too() -> None:
    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    pixels[0, 1, :2, :3] = 51
    shown = picture(ImageBatch(pixels, torch.zeros(1, 4, 4, dtype=torch.bool), [(2, 3)]), 0)
    torch.testing.assert_close(shown, torch.tensor([0.0, 0.2, 0.0]).expand(2, 3, 3))


# curves

MASK = torch.tensor([[True, True], [False, False]])


def curve_of(*images: tuple[list[list[float]], torch.Tensor]) -> dict:
    curve = Curve()
    for values, mask in images:
        curve.add(torch.tensor(values), mask)
    return curve.result()


def test_iof_and_iob_are_the_shares_strictly_above_each_threshold() -> None:
    found = curve_of(([[0.9, 0.5], [0.25, 0.0]], MASK))
    at = {s: (found["iof"][k], found["iob"][k]) for k, s in enumerate(THRESHOLDS)}
    assert at[0.0] == (1.0, 0.5) and at[0.24] == (1.0, 0.5) and at[0.25] == (1.0, 0.0)
    assert at[0.49] == (1.0, 0.0) and at[0.5] == (0.5, 0.0) and at[0.89] == (0.5, 0.0)
    assert at[0.9] == (0.0, 0.0) and at[1.0] == (0.0, 0.0)
    assert len(found["iof"]) == len(found["iob"]) == len(THRESHOLDS)
    assert set(THRESHOLDS) >= {k / 100 for k in range(101)} and sorted(set(THRESHOLDS)) == THRESHOLDS


def test_a_perfect_map_has_area_1_a_constant_one_a_half_and_an_inverted_one_0() -> None:
    for values, expected in (
        ([[1.0, 1.0], [0.0, 0.0]], 1.0),
        ([[0.3, 0.3], [0.3, 0.3]], 0.5),
        ([[0.0, 0.0], [1.0, 1.0]], 0.0),
    ):
        found = curve_of((values, MASK))
        assert found["area"] == found["mean_area"] == expected


def test_maps_that_are_nearly_constant_are_told_apart_too() -> None:
    assert curve_of(([[0.9995, 1.0], [0.999, 0.9991]], MASK))["area"] == 1.0
    assert curve_of(([[0.99951, 0.9992], [0.9994, 0.99991]], MASK))["area"] == 0.25


def test_the_area_joins_the_points_and_the_corners_by_straight_lines() -> None:
    # (0, 0) - (0.5, 0.75) - (1, 1)
    assert area(torch.tensor([0.75]), torch.tensor([0.5])) == pytest.approx(0.1875 + 0.4375)


def test_pixels_are_summed_over_images_and_ratios_are_averaged_beside_them() -> None:
    big = torch.zeros(2, 4, dtype=torch.bool)
    big[0, :3] = True  # 3 of 8 pixels
    found = curve_of(([[1.0, 1.0], [0.0, 1.0]], MASK), ([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], big))
    assert found["iof"][50] == pytest.approx((2 + 1) / (2 + 3)) and found["iob"][50] == pytest.approx(2 / 7)
    assert found["mean_iof"][50] == pytest.approx((1 + 1 / 3) / 2)
    assert found["mean_iob"][50] == pytest.approx((1 / 2 + 1 / 5) / 2)


def test_images_without_objects_count_in_iob_only_and_full_ones_in_iof_only() -> None:
    ones, zeros = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    found = curve_of(([[1.0, 1.0], [0.0, 0.0]], MASK), ([[1.0] * 2] * 2, zeros), ([[0.0] * 2] * 2, ones))
    assert found["iof"][50] == pytest.approx(2 / 6) and found["mean_iof"][50] == pytest.approx(1 / 2)
    assert found["iob"][50] == pytest.approx(4 / 6) and found["mean_iob"][50] == pytest.approx(1 / 2)
    for mask, message in ((zeros, "no pixel .* lies in a box"), (ones, "no pixel .* lies outside all boxes")):
        with pytest.raises(UserError, match=message):
            curve_of(([[1.0] * 2] * 2, mask))


# attention


def splat_points(points: list[tuple[float, float]], shape: tuple[int, int]) -> torch.Tensor:
    """Splat one query whose points have weight 1 each."""
    locations = torch.tensor(points).view(1, 1, 1, 1, -1, 2)
    samples = Samples(locations, torch.ones(locations.shape[:-1]))
    return splat(samples, torch.ones(1, 1, dtype=torch.bool), (shape,))[0][0]


def test_a_point_is_shared_bilinearly_by_the_four_cells_around_it() -> None:
    # x = 0.375 * 4 - 0.5 = 1, y = 0.3125 * 4 - 0.5 = 0.75
    assert splat_points([(0.375, 0.3125)], (4, 4))[:2].tolist() == [[0, 0.25, 0, 0], [0, 0.75, 0, 0]]
    # x = 0.5 * 2 - 0.5 = 0.5, y = 0.5 * 1 - 0.5 = 0
    assert splat_points([(0.5, 0.5)], (1, 2)).tolist() == [[0.5, 0.5]]


def test_shares_outside_the_map_are_lost() -> None:
    assert splat_points([(0.0, 0.5)], (1, 2)).tolist() == [[0.5, 0.0]]
    assert splat_points([(-0.5, 0.5), (3.0, 0.5), (0.5, 9.0)], (1, 2)).tolist() == [[0.0, 0.0]]
    assert splat_points([(0.25, 0.5), (0.25, 0.5)], (1, 2)).tolist() == [[2.0, 0.0]]  # weights add up


def test_splatting_is_the_transpose_of_what_the_attention_reads() -> None:
    model = build_model(tiny_args())[0].eval()
    attention = model.transformer.decoder.layers[-1].cross_attn
    torch.nn.init.normal_(attention.attention_weights.weight)
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.1)
    torch.nn.init.eye_(attention.output_proj.weight)
    torch.nn.init.zeros_(attention.value_proj.weight)
    torch.nn.init.ones_(attention.value_proj.bias)  # every cell has the value 1
    shapes = ((4, 5), (2, 3), (1, 2), (1, 1))
    query, reference = torch.randn(2, 3, 32), torch.rand(2, 3, 4, 2)
    memory = torch.zeros(2, sum(h * w for h, w in shapes), 32)
    read = attention(query, reference, memory, shapes).sum(-1) / 16  # summed over two heads of 16 channels
    samples = sampling(attention, query, reference, shapes)
    for q in range(3):
        chosen = torch.arange(3).expand(2, 3) == q
        given = sum(level.sum((1, 2)) for level in splat(samples, chosen, shapes))
        torch.testing.assert_close(given, read[:, q])


# positives of every scheme


def watched(flags: str, targets=None):
    """Return model output, what was seen, criterion and targets of one training step without dropout."""
    model, criterion, _ = build_model(tiny_args(flags))
    model.eval().groups.train()
    targets = targets or tiny_targets()
    with torch.no_grad(), watch(model) as seen:
        output = model(tiny_images(), targets)
    assert not any(module._forward_hooks for module in model.modules())
    return output, seen, criterion, targets


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"one2one": [2, 0]}),
        (ONE2MANY, {"one2one": [2, 0], "one2many": [4, 0]}),
        (f"{ONE2MANY} --one2many_groups isolated", {"one2one": [2, 0], "one2many": [4, 0]}),
        (f"{ONE2MANY} --one2many_own decoder", {"one2one": [2, 0], "one2many": [4, 0]}),
        (f"{ONE2MANY} --one2many_own encoder", {"one2one": [2, 0], "one2many": [4, 0]}),
        ("--hybrid layer --hybrid_layers 1 --hybrid_k 3", {"one2one": [2, 0]}),
        ("--hybrid epoch --hybrid_k 3", {"one2one": [6, 0]}),
    ],
)
def test_positives_are_the_matched_queries_of_every_living_group(flags, expected) -> None:
    output, seen, criterion, targets = watched(flags)
    maps, chosen = attention_of_positives(output, seen, criterion, targets)
    assert {name: found.sum(1).tolist() for name, found in chosen.items()} == expected
    assert [tuple(level.shape[1:]) for level in maps] == list(seen.memory.shapes)
    total = sum(level.sum((1, 2)) for level in maps)
    # Every positive gives each of its 2 heads a weight of 1 at most: less where points fall out of the map.
    assert 0 < total[0] <= 2 * sum(first for first, _ in expected.values()) + 1e-4 and total[1] == 0


def test_the_pairs_of_auxiliary_heads_are_taken_as_they_are() -> None:
    output, seen, criterion, targets = watched(f"--with_box_refine {CO}")
    found = positives("co_atss", output.sets["co_atss"], criterion, targets)
    (supervision,) = output.sets["co_atss"].supervision
    pairs = supervision.assign
    assert set(seen.samples) == set(output.sets) == {"one2one", "co_atss"}
    last = [(i, s) for n, i, s in zip(*(x.tolist() for x in (pairs.layer, pairs.image, pairs.slot))) if n == 1]
    assert last and sorted(last) == [tuple(pair) for pair in found.nonzero().tolist()]


def test_pairs_of_weight_0_and_of_other_layers_are_no_positives() -> None:
    output, _, criterion, targets = watched("")
    numbers = [[0, 1, 1], [0, 0, 0], [5, 6, 7], [0, 0, 1]]  # layer, image, slot, target
    pairs = Assignment(*torch.tensor(numbers), weight=torch.tensor([1.0, 0.5, 0.0]))
    supervised = replace(output.sets["one2one"], supervision=(Supervision(pairs),))
    assert positives("one2one", supervised, criterion, targets).nonzero().tolist() == [[0, 6]]
    # The layers of ready-made pairs count among the supervised ones: here layer 0 is the second and last.
    supervised = replace(supervised, supervision=(Supervision(pairs, layers=range(1, 2)),))
    assert positives("one2one", supervised, criterion, targets).nonzero().tolist() == [[0, 5]]
    supervised = replace(supervised, supervision=(Supervision(pairs, layers=range(1)),))
    assert not positives("one2one", supervised, criterion, targets).any()


def test_hungarian_pairs_are_those_of_the_criterion(monkeypatch) -> None:
    output, seen, criterion, targets = watched(ONE2MANY)
    _, chosen = attention_of_positives(output, seen, criterion, targets)
    matcher, expected = criterion.assigners["queries"], {}

    def listen(requests):
        answers = matcher(requests)
        for request, pairs in zip(requests, answers):
            here, start = pairs.layer == 1, request.slots.start
            expected[request.name] = set(zip(pairs.image[here].tolist(), (pairs.slot[here] - start).tolist()))
        return answers

    monkeypatch.setitem(criterion.assigners, "queries", listen)
    criterion(output, targets)
    for name, found in chosen.items():
        assert {tuple(pair) for pair in found.nonzero().tolist()} == expected[name]


def test_queries_with_a_decoder_of_their_own_are_watched_in_it() -> None:
    model = build_model(tiny_args(f"{ONE2MANY} --one2many_own decoder"))[0]
    model.eval().groups.train()
    own = model.groups["one2many"].own.decoder.layers[-1].cross_attn

    def seen_with(bias: float) -> dict[str, Samples]:
        torch.nn.init.constant_(own.sampling_offsets.bias, bias)
        with torch.no_grad(), watch(model) as seen:
            model(tiny_images(), tiny_targets())
        return seen.samples

    before, after = seen_with(0.0), seen_with(1.0)
    assert torch.equal(before["one2one"].locations, after["one2one"].locations)
    assert not torch.equal(before["one2many"].locations, after["one2many"].locations)


def test_a_batch_without_any_object_has_no_positives() -> None:
    output, seen, criterion, targets = watched(f"--with_box_refine {CO}", [make_target(), make_target()])
    maps, chosen = attention_of_positives(output, seen, criterion, targets)
    assert not any(found.any() for found in chosen.values()) and not any(level.any() for level in maps)


# whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("discriminability") / "run"
    assert run(folder, "--epochs 1 --eval_every 9") == 0
    return folder


def analysed(resume: Path, folder: Path, flags: str = "") -> dict:
    """Analyse a checkpoint, check what holds for every detector, and return the result."""
    assert run(folder, f"{flags} --analyse discriminability --resume {resume}") == 0
    result = read_result(folder / "discriminability.json")
    assert result["images"] == 5 and result["positive_queries"]["one2one"] == result["objects"] > 0
    assert result["positives_per_object"] == sum(result["positive_queries"].values()) / result["objects"]
    for part in ("encoder", "decoder"):
        assert 0 < result[part]["area"] < 1 and 0 < result[part]["mean_area"] < 1
        assert result[part]["iof"] == sorted(result[part]["iof"], reverse=True) and result[part]["iof"][-1] == 0
    for name in ("discriminability.png", "discriminability_examples.png"):
        assert Image.open(folder / name).width > 800
    return result


def test_a_checkpoint_is_analysed_and_drawn_beside_others(trained, tmp_path, capsys) -> None:
    first = analysed(trained / "checkpoint.pth", tmp_path / "a")
    assert first["label"] == "run" and list(first["positive_queries"]) == ["one2one"]
    assert table([first]).splitlines()[1] in capsys.readouterr().out
    more = f"--analyse_label second --analyse_with {tmp_path}/a/discriminability.json"
    second = analysed(trained / "checkpoint.pth", tmp_path / "b", more)
    rows = capsys.readouterr().out.split("area under the curve")[1].splitlines()
    assert [row.split()[0] for row in rows[1:3]] == ["second", "run"]
    assert second == first | {"label": "second"}


def test_all_queries_of_training_count_in_the_decoder(tmp_path) -> None:
    # One image of 64 x 64 alone has a single cell on the heads' last level, which a GroupNorm refuses.
    flags = f"{ONE2MANY} {CO} --eval_batch_size 5"
    assert run(tmp_path / "run", f"{flags} --epochs 1 --eval_every 9") == 0
    result = analysed(tmp_path / "run" / "checkpoint.pth", tmp_path / "a", flags)
    assert list(result["positive_queries"]) == ["one2one", "one2many", "co_atss"]
    assert result["positives_per_object"] > 2


def test_a_wrong_file_to_compare_with_is_told_before_any_work(trained, tmp_path, capsys) -> None:
    flags = f"--analyse discriminability --resume {trained}/checkpoint.pth --analyse_with {trained}/args.json"
    assert run(tmp_path / "a", flags) == 2
    printed = capsys.readouterr()
    assert f"{trained}/args.json is not of an analysis" in printed.err and "[1/5]" not in printed.out


def test_the_pictures_are_left_out_without_matplotlib(trained, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(tmp_path / "a", f"--analyse discriminability --resume {trained}/checkpoint.pth") == 0
    assert "no pictures: " in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "a").glob("discrim*")) == ["discriminability.json"]


@pytest.mark.filterwarnings("ignore:.*matching costs are not finite")
def test_weights_of_a_diverged_run_are_refused(trained, tmp_path, capsys) -> None:
    model = read_checkpoint(trained / "checkpoint.pth")["model"]
    model["input_proj.0.0.weight"].fill_(float("nan"))
    path = tmp_path / "broken.pth"
    torch.save({"model": model}, path)
    assert run(tmp_path / "a", f"--analyse discriminability --resume {path}") == 2
    assert "the encoder map of image id 1 is not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is not a JSON file"),
        ("[1, 2]", "is not of an analysis"),
        ('{"analysis": "conflict"}', "is of the analysis conflict; give discriminability.json"),
        ('{"analysis": "discriminability", "label": "a"}', "has no complete curves"),
    ],
)
def test_other_files_than_results_of_this_analysis_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"--analyse_with: {path} {message}"):
        read_result(path)


def test_a_result_with_curves_of_unequal_length_is_refused(tmp_path: Path) -> None:
    part = {"area": 0.5, "iof": [1.0, 0.0], "iob": [1.0, 0.0]}
    result = {"analysis": "discriminability", "label": "a", "positives_per_object": 1.0, "thresholds": [0.0, 1.0]}
    result |= {"encoder": part, "decoder": part}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(result))
    assert read_result(path) == result
    path.write_text(json.dumps(result | {"decoder": part | {"iob": [1.0]}}))
    with pytest.raises(UserError, match="has no complete curves"):
        read_result(path)
