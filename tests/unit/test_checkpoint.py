"""Files with weights: safe to read, never half written, and loadable under every published name."""

import argparse

import pytest
import torch

from datasets.coco_names import COCO_NAMES
from models import build_model
from tests.tiny import tiny_args
from util.checkpoint import init_from, load_weights, read_checkpoint, remove_stale, write_atomically
from util.errors import UserError
from util.misfit import group_names


def tiny_model(flags: str = "") -> torch.nn.Module:
    return build_model(tiny_args(flags))[0]


def other_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict of the same model with random numbers; shared tensors stay equal under all their names."""
    drawn: dict[int, torch.Tensor] = {}
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        drawn.setdefault(id(value), torch.rand(value.shape).to(value.dtype))
        state[name] = drawn[id(value)].clone()
    return state


def assert_same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


# writing


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    write_atomically({"epoch": 1}, path)

    def half(content, file):
        file.write(b"half of it")
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match=r"cannot write .*checkpoint\.pth: no space left.*untouched"):
        write_atomically({"epoch": 2}, path)
    assert read_checkpoint(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_the_new_file_takes_the_place_of_the_old_one_and_never_overwrites_it(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_atomically({"epoch": 1}, path)
    content = path.read_bytes()
    with path.open("rb") as reader:
        write_atomically({"epoch": 2}, path)
        assert reader.read() == content  # who had opened the old file still reads all of it
    assert read_checkpoint(path) == {"epoch": 2}


def test_stale_temporary_files_are_removed_and_named(tmp_path):
    (tmp_path / "checkpoint.pth.tmp").write_bytes(b"half")
    (tmp_path / "checkpoint.pth").write_bytes(b"whole")
    (tmp_path / "notes.tmp").write_bytes(b"of the user")
    assert remove_stale(tmp_path) == ["checkpoint.pth.tmp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pth", "notes.tmp"]


# reading


def test_a_missing_file_is_told_with_the_files_that_are_there(tmp_path):
    write_atomically({"epoch": 1}, tmp_path / "checkpoint0004.pth")
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist; use another file of .*: checkpoint0004\.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_file_is_told_with_the_way_out(tmp_path, kept):
    path = tmp_path / "checkpoint.pth"
    write_atomically({"model": {"weight": torch.rand(1000)}}, path)
    write_atomically({"epoch": 1}, tmp_path / "checkpoint0004.pth")
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(UserError, match=r"checkpoint\.pth .*cannot be read, it is cut off.*checkpoint0004\.pth"):
        read_checkpoint(path)


def test_a_text_file_is_no_checkpoint(tmp_path):
    (tmp_path / "weights.pth").write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"weights\.pth .*no checkpoint at all \(UnpicklingError\);"):
        read_checkpoint(tmp_path / "weights.pth")


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)


class Unexpected:
    """A class that a checkpoint must not be able to bring in."""


def test_only_the_namespace_of_published_files_is_unpickled(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1.0)}, tmp_path / "published.pth")
    assert read_checkpoint(tmp_path / "published.pth")["args"].lr == 1.0
    torch.save({"args": Unexpected()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth holds the class .*Unexpected, which is not loaded for safety"):
        read_checkpoint(tmp_path / "evil.pth")


# loading


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": {f"module.{n}": v for n, v in state.items()}, "epoch": 3},
        lambda state: {"model": {f"module._orig_mod.{n}": v for n, v in state.items()}},
        lambda state: {"ema": {"module": 1, "model": state}},
        lambda state: {"model": {**state, "backbone.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}},
        lambda state: {"model": {**state, "backbone.0.body.bn1.num_batches_tracked": torch.tensor(5)}},
    ],
    ids=["bare", "model", "module", "compiled", "ema", "counters", "norms"],
)
def test_every_wrapper_of_the_weights_is_taken_off(wrap):
    model = tiny_model()
    state = other_weights(model)
    assert load_weights(model, wrap(state)).fits
    assert_same(model, state)


def test_second_names_of_shared_tensors_may_be_missing():
    model = tiny_model("--with_box_refine --two_stage")
    state = other_weights(model)
    short = {n: v for n, v in state.items() if not n.startswith("bbox_embed")}
    assert len(short) < len(state)
    assert load_weights(model, short).fits
    assert_same(model, state)


def test_the_last_name_in_the_file_wins_when_copies_differ():
    model = tiny_model()
    state = other_weights(model)
    state["class_embed.1.bias"] = torch.full_like(state["class_embed.1.bias"], 5.0)
    report = load_weights(model, state)
    assert (model.class_embed[0].bias == 5.0).all()
    assert any("took class_embed.1.bias" in line for line in report.lines)

    model = tiny_model("--with_box_refine")
    state = other_weights(model)
    name = "bbox_embed.0.layers.2.bias"
    state[name] = torch.full_like(state[name], 7.0)  # the decoder's name comes first in the file
    load_weights(model, state)
    assert (model.transformer.decoder.bbox_embed[0].layers[2].bias == 7.0).all()


def test_a_hybrid_file_fits_a_model_without_training_queries():
    hybrid = tiny_model("--num_queries_one2many 12 --k_one2many 2")
    state = other_weights(hybrid)
    plain = tiny_model()
    report = load_weights(plain, state)
    assert report.fits
    assert report.lines == ["query_embed.weight: took the first 8 of 20 rows"]
    assert torch.equal(plain.query_embed.weight, state["query_embed.weight"][:8])


def test_parts_of_a_training_scheme_are_left_out_where_the_model_is_without_it():
    branch = "--with_box_refine --num_queries_one2many 12 --k_one2many 2"
    state = other_weights(tiny_model(f"{branch} --one2many_own heads"))
    report = load_weights(tiny_model("--with_box_refine"), state)
    assert report.fits
    assert "left out what only training needs: groups.one2many.*" in report.lines
    with pytest.raises(UserError, match=r"groups\.one2many"):  # the branch is there, but shares its heads
        load_weights(tiny_model(branch), state)


@pytest.mark.parametrize(
    ("theirs", "ours", "advice"),
    [
        ("--with_box_refine --two_stage", "--with_box_refine", ["add --two_stage"]),
        ("", "--with_box_refine", ["leave --with_box_refine out"]),
        ("--with_box_refine --two_stage --mixed_selection", "--with_box_refine --two_stage", ["add --mixed_selection"]),
        ("--dim_feedforward 64", "", ["use --dim_feedforward 64 (now 48)"]),
        ("--num_feature_levels 1", "", ["use --num_feature_levels 1 (now 4)"]),
        ("--dec_layers 3 --enc_layers 2", "", ["use --dec_layers 3 (now 2)", "use --enc_layers 2 (now 1)"]),
        ("--hidden_dim 64", "", ["use --hidden_dim 64 (now 32)"]),
        ("--backbone resnet34", "", ["use --backbone resnet34 (now resnet18)"]),
        ("--num_queries 5", "", ["query table has 5 rows", "--num_queries_one2one"]),
        ("--num_classes 9", "", ["9 classes, this model 4", "--init_from", "--num_classes 9"]),
        ("--nheads 4", "", ["check --nheads", "the file says --nheads 4"]),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_flags_that_would_fit(theirs, ours, advice):
    content = {"model": tiny_model(theirs).state_dict(), "args": tiny_args(theirs)}
    with pytest.raises(UserError, match="is of another model") as caught:
        load_weights(tiny_model(ours), content, name="file.pth")
    for part in advice:
        assert part in str(caught.value)


def test_misfits_are_grouped_over_layers():
    names = [f"transformer.encoder.layers.{i}.linear1.weight" for i in range(6)] + ["query_embed.weight"]
    assert group_names(names) == ["transformer.encoder.layers.*.linear1.weight (x6)", "query_embed.weight"]


def test_loading_what_fits_reports_the_rest_and_leaves_it_alone():
    model = tiny_model("--num_classes 3")
    before = model.class_embed[0].weight.detach().clone()
    state = other_weights(tiny_model())
    report = load_weights(model, state, strict=False)
    assert set(report.reshaped) == {f"class_embed.{i}.{part}" for i in range(2) for part in ("weight", "bias")}
    assert torch.equal(model.class_embed[0].weight, before)
    assert torch.equal(model.query_embed.weight, state["query_embed.weight"])


def test_a_file_without_weights_is_refused():
    with pytest.raises(UserError, match="no weights found"):
        load_weights(tiny_model(), {"epoch": 3})


# starting from other weights


def saved(tmp_path, model, **extra) -> tuple[str, dict]:
    state = other_weights(model)
    write_atomically({"model": state, **extra}, tmp_path / "start.pth")
    return str(tmp_path / "start.pth"), state


def test_class_rows_are_copied_by_name(tmp_path):
    path, state = saved(tmp_path, tiny_model("--num_classes 3"), class_names=["cat", "dog", "bird"])
    model = tiny_model("--num_classes 4")
    before = model.class_embed[0].weight.detach().clone()
    report, copied = init_from(model, path, ["horse", "bird", "cat", "N/A"], copy_class_rows=True)
    rows = state["class_embed.0.weight"]
    assert copied == ["bird", "cat"]
    assert torch.equal(model.class_embed[0].weight, torch.stack([before[0], rows[2], rows[0], before[3]]))
    assert report.fits


def test_class_rows_of_another_width_are_listed(tmp_path):
    path, _ = saved(tmp_path, tiny_model("--num_classes 3"), class_names=["cat", "dog", "bird"])
    report, _ = init_from(tiny_model("--num_classes 3 --hidden_dim 64"), path, ["cat"] * 3, copy_class_rows=True)
    (theirs, ours) = report.reshaped["class_embed.0.weight"]
    assert (theirs[0], ours) == (3, (3, 64)) and theirs != ours


def test_starting_with_other_classes_is_not_advised_to_do_what_it_does(tmp_path):
    path, _ = saved(tmp_path, tiny_model("--num_classes 3"))
    report, _ = init_from(tiny_model("--num_classes 2"), path, ["cat", "dog"])
    assert "class_embed.0.weight" in report.reshaped and not report.advice


def test_the_object_row_of_the_encoder_head_is_copied_as_it_is(tmp_path):
    flags = "--with_box_refine --two_stage --num_classes "
    path, state = saved(tmp_path, tiny_model(flags + "3"), class_names=["cat", "dog", "bird"])
    model = tiny_model(flags + "2")
    init_from(model, path, ["dog", "fish"], copy_class_rows=True)
    assert torch.equal(model.class_embed[2].weight[0], state["class_embed.2.weight"][0])
    assert torch.equal(model.class_embed[1].weight[0], state["class_embed.1.weight"][1])


def test_published_coco_files_have_known_class_names(tmp_path):
    path, state = saved(tmp_path, tiny_model("--num_classes 91"))
    model = tiny_model("--num_classes 2")
    _, copied = init_from(model, path, ["drone", "zebra"], copy_class_rows=True)
    assert copied == ["zebra"]
    assert COCO_NAMES[24] == "zebra"
    assert torch.equal(model.class_embed[0].weight[1], state["class_embed.0.weight"][24])


def test_class_rows_without_class_names_are_refused(tmp_path):
    path, _ = saved(tmp_path, tiny_model("--num_classes 3"))
    with pytest.raises(UserError, match=r"--init_class_rows: .* does not say its class names"):
        init_from(tiny_model(), path, ["a"], copy_class_rows=True)
