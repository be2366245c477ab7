"""Pictures of attention: points are where a detector reads, in pixels of the picture; whole runs on tiny weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from main import get_args_parser, main
from models import build_model
from models.detector import Detector
from tests.cli import run
from tests.tiny import TWO_STAGE, tiny_args, tiny_images
from util.analysis.attention_pictures import arrays, layers_name
from util.analysis.attention_plot import Titles, close_view, draw_looks
from util.analysis.points import Look, Watched, best_queries, tokens_at, watch_points
from util.boxes import xyxy_to_cxcywh
from util.environment import plain_args
from util.errors import UserError
from util.picture_args import wanted_queries
from util.structures import DetectorOutput, Memory

BOXES = "--query_pos box --with_box_refine"
FIVE = "--num_feature_levels 5 --return_interm_indices 0 1 2 3"
MODELS = ["", "--with_box_refine", TWO_STAGE, BOXES, f"{BOXES} --two_stage {FIVE}", "--num_feature_levels 1", FIVE]
PADDED = 1  # the second of `tiny_images`: 48 x 57 pixels on a canvas of 64 x 64
SIZE = (96, 114)  # (h, w) of its picture: twice as large


def tiny_detector(flags: str = "") -> Detector:
    """Return a detector whose attention has neither offsets nor preferences."""
    torch.manual_seed(0)
    model = build_model(tiny_args(flags))[0].eval()
    layers = model.transformer
    for attention in [x.self_attn for x in layers.encoder.layers] + [x.cross_attn for x in layers.decoder.layers]:
        for linear in (attention.sampling_offsets, attention.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    return model


@torch.no_grad()
def watched(model: Detector) -> tuple[Watched, DetectorOutput]:
    with watch_points(model) as seen:
        output = model(tiny_images())
    return seen, output


def looks_of(model: Detector, queries: tuple[int, ...] = (0, 5)) -> list[list[Look]]:
    """Return the looks on both decoder layers, in the padded image."""
    seen, output = watched(model)
    return seen.queries(output, PADDED, queries, (1, 2), SIZE)


# where the points are


@pytest.mark.parametrize("flags", MODELS)
def test_without_offsets_all_points_are_at_the_reference_point(flags: str) -> None:
    for looks in looks_of(tiny_detector(flags)):
        for look in looks:
            points = look.locations.reshape(-1, 2)
            np.testing.assert_allclose(points, np.broadcast_to(look.reference[:2], points.shape), rtol=1e-5, atol=1e-3)
            np.testing.assert_allclose(look.weights, 1 / look.weights[0].size, rtol=1e-5)


@pytest.mark.parametrize("flags", MODELS)
def test_numbers_of_every_model_can_be_stored(flags: str) -> None:
    looks = looks_of(tiny_detector(flags))
    found = arrays(looks, SIZE)
    starts_as_box = "two_stage" in flags or "query_pos" in flags
    later_a_box = "refine" in flags
    for layer, box in enumerate((starts_as_box, later_a_box)):
        assert np.isnan(found["reference"][:, layer, 2:]).all() != box
    for row, own in zip(looks, found["reference"]):
        for look, reference in zip(row, own):
            assert reference[: len(look.reference)].tolist() == look.reference.tolist()


def test_the_reference_point_of_a_fixed_query_is_that_of_the_model_in_pixels() -> None:
    model = tiny_detector()
    pos = model.query_embed.weight[5, :32]
    x, y = model.transformer.reference_points(pos).sigmoid().tolist()
    for look in looks_of(model, (5,))[0]:
        np.testing.assert_allclose(look.reference, [114 * x, 96 * y], rtol=1e-4)


@pytest.mark.parametrize("flags", [TWO_STAGE, BOXES])
def test_with_refinement_the_box_of_a_layer_is_the_reference_of_the_next(flags: str) -> None:
    for first, second in looks_of(tiny_detector(flags)):
        box = xyxy_to_cxcywh(torch.from_numpy(first.box)).numpy()
        np.testing.assert_allclose(second.reference, box, rtol=1e-3, atol=1e-2)


def offset_bias(model: Detector, layer: int, head: int, level: int, point: int, offset: tuple[float, float]) -> None:
    """Give one sampling point of a decoder layer an offset."""
    attention = model.transformer.decoder.layers[layer - 1].cross_attn
    bias = attention.sampling_offsets.bias.detach()
    bias.view(attention.n_heads, attention.n_levels, attention.n_points, 2)[head, level, point] = torch.tensor(offset)


def test_an_offset_counts_cells_of_its_level_for_points() -> None:
    model = tiny_detector()
    offset_bias(model, layer=2, head=1, level=0, point=3, offset=(1.5, -2.0))
    first, second = looks_of(model, (0,))[0]
    # Stride 8: 6 rows and 8 columns of the 48 x 57 pixels are image (column 7 begins at pixel 56), so that a cell has
    # 96 / 6 x 114 / 8 pixels of the picture.
    moved = second.locations - second.reference
    np.testing.assert_allclose(moved[1, 0, 3], [1.5 * 114 / 8, -2 * 96 / 6], rtol=1e-4)
    moved[1, 0, 3] = 0
    np.testing.assert_allclose(moved, 0, atol=1e-3)
    np.testing.assert_allclose(first.locations - first.reference, 0, atol=1e-3)


def test_an_offset_counts_parts_of_half_the_box_for_boxes() -> None:
    model = tiny_detector(BOXES)
    offset_bias(model, layer=1, head=0, level=2, point=1, offset=(2.0, -1.0))
    look = looks_of(model, (3,))[0][0]
    _, _, width, height = look.reference
    # 2 of 4 points is half of half the width.
    np.testing.assert_allclose(
        look.locations[0, 2, 1] - look.reference[:2], [width / 4, -height / 8], rtol=1e-3, atol=1e-3
    )


def test_weights_belong_to_their_points() -> None:
    model = tiny_detector()
    attention = model.transformer.decoder.layers[0].cross_attn
    attention.attention_weights.bias.detach().view(2, 4, 4)[1, 2, 3] = 50.0
    look = looks_of(model, (0,))[0][0]
    assert look.weights[1, 2, 3] == pytest.approx(1) and look.weights[0, 2, 3] == pytest.approx(1 / 16)


def test_boxes_scores_and_classes_are_those_of_the_layer() -> None:
    model = tiny_detector("--with_box_refine")
    seen, output = watched(model)
    found = output.sets["one2one"].predictions
    (looks,) = seen.queries(output, 0, [4], (1, 2), (64, 64))
    for layer, look in enumerate(looks):
        cx, cy, w, h = (64 * found.boxes[layer, 0, 4]).tolist()
        np.testing.assert_allclose(look.box, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], rtol=1e-4, atol=1e-4)
        assert look.score == pytest.approx(found.logits[layer, 0, 4].sigmoid().max().item())
        assert look.label == found.logits[layer, 0, 4].argmax()


def test_a_watched_model_says_the_same_and_is_left_as_it_was() -> None:
    model = tiny_detector(TWO_STAGE)
    _, output = watched(model)
    with torch.no_grad():
        plain = model(tiny_images())
    assert torch.equal(output.pred_boxes, plain.pred_boxes)
    assert not any(module._forward_hooks for module in model.modules())


# encoder tokens


def test_the_token_at_a_point_is_that_of_its_cell_on_every_level() -> None:
    padding = torch.ones(1, 4, 4, dtype=torch.bool)
    padding[0, :2, :3] = False  # 2 rows and 3 columns are image
    coarse = torch.zeros(1, 2, 2, dtype=torch.bool)
    memory = Memory(
        torch.zeros(1, 20, 8), torch.cat([padding.flatten(1), coarse.flatten(1)], 1), ((4, 4), (2, 2)), None
    )
    assert tokens_at(memory, 0, (0.0, 0.0)) == [0, 16]
    assert tokens_at(memory, 0, (0.5, 0.9)) == [4 + 1, 16 + 2 + 1]  # row 1, column 1; row 1, column 1
    assert tokens_at(memory, 0, (0.99, 0.4)) == [2, 16 + 1]
    assert tokens_at(memory, 0, (1.0, 1.0)) == [4 + 2, 16 + 2 + 1]  # the border belongs to the last cells


def test_a_token_starts_at_the_centre_of_its_cell() -> None:
    seen, _ = watched(tiny_detector())
    rows = seen.tokens(PADDED, (50.0, 20.0), (1,), SIZE)
    # Level 0 has 6 x 8 cells of 16 x 14.25 pixels: (50, 20) is in column 3 and row 1.
    np.testing.assert_allclose(rows[0][0].reference, [3.5 * 14.25, 1.5 * 16], rtol=1e-4)
    np.testing.assert_allclose(rows[0][0].locations.reshape(-1, 2), [[3.5 * 14.25, 1.5 * 16]] * 32, rtol=1e-4)
    # Level 1 has 3 x 4 cells.
    np.testing.assert_allclose(rows[1][0].reference, [1.5 * 28.5, 0.5 * 32], rtol=1e-4)
    assert len(rows) == 4 and rows[0][0].box is None


# what is chosen


def test_the_best_queries_are_those_with_the_best_scores() -> None:
    output = watched(tiny_detector())[1]
    logits = output.sets["one2one"].predictions.logits
    logits[-1] = 0
    logits[-1, 0, 6, 1], logits[-1, 0, 2, 3], logits[-1, 1, 0, 0] = 3, 2, 9
    assert best_queries(output, 0, 2) == [6, 2]
    assert len(best_queries(output, 0, 99)) == 8


def test_queries_are_asked_for_by_rank_or_number() -> None:
    assert wanted_queries(["top", "5"]) == (5, ())
    assert wanted_queries(["4", "17", "4"]) == (0, (4, 17))
    for words in (["top"], ["top", "0"], ["best"], ["-1"], ["3", "x"]):
        with pytest.raises(ValueError):
            wanted_queries(words)


def test_file_names_say_the_layers() -> None:
    assert layers_name([2]) == "layer_2"
    assert layers_name(range(1, 7)) == "layers_1-6"
    assert layers_name((1, 3, 6)) == "layers_1_3_6"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--attention_layers 1", "--attention_layers: belongs to --analyse attention"),
        ("--analyse attention --attention_layers 3", "--attention_layers 3: layers are 1 to 2"),
        ("--analyse attention --attention_queries best", "--attention_queries best: say top N, or numbers"),
        ("--analyse attention --attention_encoder 1 2 3", "got 3 numbers: give pairs, x and y"),
        ("--analyse attention --attention_ids 3 --attention_images a.png", "give one of them"),
        ("--analyse attention --analyse_images 0", "--analyse_images 0: must be at least 1"),
        ("--analyse attention --analyse_label a", "draws no curves"),
    ],
)
def test_impossible_flags_are_refused_with_the_way_out(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(tiny_args(flags))


# what is drawn


def look_at(points: np.ndarray, layer: int = 1) -> Look:
    """Return a look of one head and level at `points` (P, 2) with a box around their mean."""
    weights = np.linspace(1, 2, len(points))[None, None]
    x, y = points.mean(0)
    return Look(
        layer, points[None, None], weights / weights.sum(), np.array([x, y]), np.array([x - 4, y - 3, x + 4, y + 3])
    )


def test_there_is_a_closer_view_of_points_that_lie_close_together() -> None:
    whole = (0.0, 0.0, 200.0, 100.0)
    x0, y0, x1, y1 = close_view([look_at(np.array([[20.0, 30.0], [40.0, 40.0]]))], whole)
    assert x0 < 21 and x1 > 39 and y0 < 31 and y1 > 39
    assert (x1 - x0) / (y1 - y0) == pytest.approx(2)
    assert close_view([look_at(np.array([[20.0, 30.0], [190.0, 40.0]]))], whole) is None


def test_a_closer_view_at_the_border_stays_in_the_picture() -> None:
    x0, y0, x1, y1 = close_view([look_at(np.array([[-9.0, 95.0], [6.0, 130.0]]))], (0.0, 0.0, 200.0, 100.0))
    assert x0 == 0 and y1 == 100 and x1 < 80 and y0 > 20


def test_points_are_drawn_at_their_pixels_with_the_colour_of_their_weight(tmp_path, monkeypatch) -> None:
    import matplotlib.axes

    drawn = []
    scatter = matplotlib.axes.Axes.scatter

    def remember(axes, x, y, **style):
        points = scatter(axes, x, y, **style)
        drawn.append((np.asarray(points.get_offsets()), np.asarray(points.get_array()), axes.images[0].get_extent()))
        return points

    monkeypatch.setattr(matplotlib.axes.Axes, "scatter", remember)
    points = np.array([[20.0, 30.0], [150.0, 90.0], [60.0, 5.0]])
    path = draw_looks(
        [[look_at(points)]], Image.new("RGB", (200, 100)), Titles("t", class_names=["a"]), tmp_path / "a.png"
    )
    (places, weights, extent), *closer = drawn
    assert places.tolist() == points.tolist() and not closer
    np.testing.assert_allclose(weights, np.array([1, 1.5, 2]) / 4.5)
    assert list(extent) == [0, 200, 100, 0]  # pixels are counted from the corner of the picture
    assert path.stat().st_size > 5000


def test_every_layer_has_a_panel_and_a_closer_one(tmp_path, monkeypatch) -> None:
    import matplotlib.axes

    titles = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", lambda axes, text, **style: titles.append(text))
    points = np.array([[20.0, 30.0], [40.0, 40.0], [300.0, 40.0]])
    looks = [look_at(np.repeat(points, (20, 20, 1), axis=0), layer) for layer in (1, 2, 3, 4)]
    draw_looks([looks], Image.new("RGB", (200, 100)), Titles("t"), tmp_path / "a.png")
    outside = "3 % of the weight outside"  # the weights rise evenly from 1 to 2: the last one is 2 of 61.5
    layers = [f"layer {layer}, {outside}" for layer in (1, 2, 3, 4)]
    assert [text for text in titles if text] == [*layers[:3], *["closer"] * 3, layers[3], "closer"]


def test_numbers_have_a_place_for_every_point() -> None:
    found = arrays([[look_at(np.ones((4, 2)), layer) for layer in (1, 3)]], (10, 20))
    assert found["locations"].shape == (1, 2, 1, 1, 4, 2) and found["weights"].shape == (1, 2, 1, 1, 4)
    assert found["layers"].tolist() == [1, 3] and found["level"].shape == found["head"].shape == (1, 1, 4)
    assert found["boxes"].shape == (1, 2, 4) and found["size"].tolist() == [10, 20]


# whole runs


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of the model of `tests.cli`, with the names of its six classes."""
    from tests.cli import FLAGS

    torch.manual_seed(0)
    args = get_args_parser().parse_args(f"{FLAGS} --num_classes 6 --dec_layers 2".split())
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    content = {"format": 1, "model": build_model(args)[0].state_dict(), "args": plain_args(args)}
    torch.save(content | {"class_names": list("abcdef")}, path)
    return path


def analyse(weights: Path, folder: Path, more: str = "") -> int:
    return run(folder, f"--dec_layers 2 --analyse attention --resume {weights} {more}")


def test_a_run_draws_the_best_queries_of_the_first_images(weights, tmp_path) -> None:
    more = "--analyse_images 2 --attention_queries top 1 --attention_encoder 10 20.5 --eval_batch_size 3"
    assert analyse(weights, tmp_path, more) == 0
    names = sorted(path.name for path in (tmp_path / "attention").iterdir())
    assert len(names) == 8
    assert [name for name in names if "pixel" in name and name.endswith("png")] == [
        f"image_{i}_pixel_10_20.5_encoder_layer_1.png" for i in (1, 2)
    ]
    with np.load(next((tmp_path / "attention").glob("image_1_query_*_layers_1-2.npz"))) as found:
        assert found["locations"].shape == (1, 2, 2, 3, 4, 2)
        assert found["labels"].shape == (1, 2) and found["size"].tolist() == [64, 64]
    with np.load(tmp_path / "attention" / "image_2_pixel_10_20.5_encoder_layer_1.npz") as found:
        assert found["reference"][0, :, :2].tolist() == [[12.0, 20.0]]  # the centre of the cell of stride 8
        assert found["weights"].shape == (3, 1, 2, 3, 4) and "boxes" not in found


def test_images_and_queries_can_be_named(weights, tmp_path) -> None:
    assert analyse(weights, tmp_path, "--attention_ids 3 --attention_queries 7 --attention_layers 2") == 0
    names = sorted(path.name for path in (tmp_path / "attention").iterdir())
    assert names == ["image_3_query_7_layer_2.npz", "image_3_query_7_layer_2.png"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--attention_ids 77", "--attention_ids 77: no validation image has this id; they begin with 1, 2, 3"),
        ("--attention_queries 8", "--attention_queries 8: this model has the queries 0 to 7"),
        ("--attention_encoder 64 3", "image 1 has 64 x 64 pixels, x must be below 64"),
        ("--attention_images nowhere.png", "--attention_images: nowhere.png is not a file"),
    ],
)
def test_what_is_not_there_is_told(weights, tmp_path, capsys, more: str, message: str) -> None:
    assert analyse(weights, tmp_path, more) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_numbers_are_written(weights, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert analyse(weights, tmp_path, "--analyse_images 1 --attention_queries 2") == 0
    assert "no picture image_1_query_2_layers_1-2: " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "attention").iterdir()] == ["image_1_query_2_layers_1-2.npz"]


def test_files_are_drawn_without_a_data_set(weights, tmp_path, capsys) -> None:
    for folder, size in (("a", (90, 50)), ("b", (30, 70))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", size, "gray").save(tmp_path / folder / "photo.png")
    (tmp_path / "text.jpg").write_text("no image")
    files = f"--attention_images {tmp_path}/a/photo.png {tmp_path}/b/photo.png --attention_queries 0"
    more = f"--dataset_file coco --coco_path nowhere --test_size 32 {files}"
    assert analyse(weights, tmp_path / "out", more) == 0
    names = sorted(path.name for path in (tmp_path / "out" / "attention").glob("*.npz"))
    assert names == ["photo_1_query_0_layers_1-2.npz", "photo_2_query_0_layers_1-2.npz"]
    with np.load(tmp_path / "out" / "attention" / names[0]) as found:
        assert found["size"].tolist() == [50, 90]
        assert (found["reference"][..., :2] < [90, 50]).all()
        expected = found["reference"]
    # The file says which model it is.
    bare = f"--device cpu --test_size 32 --attention_queries 0 --attention_images {tmp_path}/a/photo.png"
    assert main(f"{bare} --analyse attention --resume {weights} --output_dir {tmp_path}/bare".split()) == 0
    with np.load(tmp_path / "bare" / "attention" / "photo_query_0_layers_1-2.npz") as found:
        assert found["reference"] == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert analyse(weights, tmp_path / "out", f"--attention_images {tmp_path}/text.jpg") == 2
    assert "text.jpg cannot be read as an image" in capsys.readouterr().err


def test_the_pictures_of_a_photograph_are_in_its_pixels(weights, tmp_path, shared_data) -> None:
    file = sorted((shared_data / "coco128" / "images").glob("*.jpg"))[0]
    more = f"--attention_images {file} --attention_queries top 2 --attention_encoder 100 50 --test_size 128"
    assert analyse(weights, tmp_path, more) == 0
    width, height = Image.open(file).size
    found = [np.load(path) for path in sorted((tmp_path / "attention").glob(f"{file.stem}_*.npz"))]
    assert len(found) == 3
    for numbers in found:
        assert numbers["size"].tolist() == [height, width]
        assert (numbers["reference"][..., :2] > 0).all() and (numbers["reference"][..., :2] < [width, height]).all()
    assert (
        np.abs(found[0]["reference"][0, 0, :2] - [100, 50]).max() < 8 * height / 128
    )  # half a cell is 4 pixels of input
