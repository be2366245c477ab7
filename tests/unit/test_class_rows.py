"""Starting from a file with other classes: what heads of DINO, hybrid and auxiliary branches keep, what they do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import main
from models import build_criterion, build_detector
from tests.tiny import TWO_STAGE, tiny_args, tiny_images, tiny_targets
from util.checkpoint import brings_backbone, init_from
from util.class_rows import common_classes, copy_rows
from util.optim import build_optimizer

DINO = f"{TWO_STAGE} --query_pos box --mixed_selection --look_forward_twice --decoder_norm --dn_number 10"
HYBRID = f"{TWO_STAGE} --num_queries_one2many 12 --k_one2many 2 --one2many_own heads"
CO = f"{TWO_STAGE} --mixed_selection --aux_heads faster_rcnn retinanet atss --roi_samples 16"
FAMILIES = {"dino": DINO, "hybrid": HYBRID, "co": CO, "plain": ""}
THEIRS, OURS = ["cat", "dog", "bird", "cow", "ant"], ["ant", "fish", "dog", "eel"]  # in common: ant, dog
PER_ANCHOR = 9  # of RetinaNet


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, dict[str, torch.Tensor]]]:
    """Return a function that writes, once per `flags`, a checkpoint with the classes `THEIRS`: path and weights."""

    @cache
    def write(flags: str) -> tuple[str, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        model = build_detector(tiny_args(f"{flags} --num_classes {len(THEIRS)}"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        path = tmp_path_factory.mktemp("start") / "file.pth"
        torch.save({"model": model.state_dict(), "class_names": THEIRS}, path)
        return str(path), model.state_dict()

    return write


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_and_trains_with_another_number_of_classes(file_of, family: str, rows: bool) -> None:
    path, given = file_of(FAMILIES[family])
    args = tiny_args(f"{FAMILIES[family]} --num_classes {len(OURS)}")
    model, criterion = build_detector(args), build_criterion(args)
    report, copied = init_from(model, path, OURS, copy_class_rows=rows)
    assert copied == (["ant", "dog"] if rows else [])
    assert not report.missing and not report.unexpected and not report.advice
    found = model.state_dict()
    others = [n for n in found if found[n].shape == given[n].shape and found[n].is_floating_point()]
    assert len(others) > 150 and all(torch.equal(found[n], given[n]) for n in others)
    if rows:
        assert not report.reshaped, "every head has rows to take"
    else:
        assert set(report.reshaped) == set(found) - set(others) - {n for n in found if "num_batches" in n}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    targets = tiny_targets()
    model.load_state_dict({n: 0.02 * v if v.is_floating_point() else v for n, v in found.items()})  # no overflow
    total = criterion(model(tiny_images([(96, 128), (80, 101)]), targets), targets).total
    total.backward()
    optimizer.step()
    assert torch.isfinite(total)


def test_class_rows_of_every_auxiliary_head_are_taken_by_name(file_of) -> None:
    path, given = file_of(CO)
    model = build_detector(tiny_args(f"{CO} --num_classes {len(OURS)}"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    init_from(model, path, OURS, copy_class_rows=True)
    found = model.state_dict()

    def rows(name: str, per_class: int = 1, anchors: int = 1, extra: int = 0) -> tuple[torch.Tensor, ...]:
        """Return a tensor by class, (classes, ...): of the model, of the file, and of the new model."""
        tensors = (found[name], given[name], before[name])
        cut = [t[: len(t) - extra] for t in tensors]
        return tuple(t.unflatten(0, (anchors, -1, per_class)).transpose(0, 1) for t in cut)

    heads = "groups.co.heads."
    for part in ("weight", "bias"):
        for name, layout in {
            f"{heads}atss.atss_cls.{part}": {},
            f"{heads}retinanet.retina_cls.{part}": {"anchors": PER_ANCHOR},
            f"{heads}faster_rcnn.roi.fc_cls.{part}": {"extra": 1},
            f"{heads}faster_rcnn.roi.fc_reg.{part}": {"per_class": 4},
        }.items():
            ours, theirs, new = rows(name, **layout)
            assert len(ours) == len(OURS) and len(theirs) == len(THEIRS)
            assert torch.equal(ours[0], theirs[4]) and torch.equal(ours[2], theirs[1]), f"{name}: ant and dog"
            assert torch.equal(ours[1], new[1]) and torch.equal(ours[3], new[3]), f"{name}: fish and eel are new"
        background = f"{heads}faster_rcnn.roi.fc_cls.{part}"
        assert torch.equal(found[background][-1], given[background][-1])


def test_rows_that_stand_for_no_class_are_kept_without_class_rows(file_of) -> None:
    path, given = file_of(CO)
    model = build_detector(tiny_args(f"{CO} --num_classes {len(OURS)}"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report, _ = init_from(model, path, OURS)
    found = model.state_dict()
    encoder, background = "class_embed.2.weight", "groups.co.heads.faster_rcnn.roi.fc_cls.weight"
    assert torch.equal(found[encoder][0], given[encoder][0]), "what ranks the proposals"
    assert torch.equal(found[encoder][1:], before[encoder][1:])
    assert torch.equal(found[background][-1], given[background][-1])
    assert torch.equal(found[background][:-1], before[background][:-1])
    assert torch.equal(found["class_embed.0.weight"], before["class_embed.0.weight"])
    assert any(line.startswith("rows that stand for no class were taken: ") for line in report.lines)


def test_proposals_of_dino_have_classes_and_no_row_for_every_object(file_of) -> None:
    path, _ = file_of(DINO)
    model = build_detector(tiny_args(f"{DINO} --num_classes {len(OURS)}"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report, _ = init_from(model, path, OURS)
    for name in ("transformer.enc_out_class_embed.weight", "label_enc.weight", "class_embed.1.weight"):
        assert name in report.reshaped and torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("flags", ["", f"{TWO_STAGE} --mixed_selection", DINO])
def test_queries_of_a_file_are_the_first_of_a_larger_table(file_of, flags: str) -> None:
    path, given = file_of(flags)
    model = build_detector(tiny_args(f"{flags} --num_classes 5 --num_queries_one2many 12 --k_one2many 2"))
    name = next(n for n in ("query_embed.weight", "transformer.tgt_embed.weight") if n in given)
    before = model.state_dict()[name].clone()
    report, _ = init_from(model, path, THEIRS, copy_class_rows=True)
    table = model.state_dict()[name]
    assert (len(given[name]), len(table)) == (8, 20) and name not in report.reshaped
    assert torch.equal(table[:8], given[name]) and torch.equal(table[8:], before[8:])
    assert f"{name}: the first 8 of 20 rows are the file's" in report.lines and not report.advice


def test_classes_are_common_by_name_whatever_their_capitals_and_hyphens() -> None:
    theirs = ["N/A", "person", "traffic light", "Cat", "cat"]
    assert common_classes(["Person", "traffic_light", "cat", "CAT", "N/A", "dog"], theirs) == [
        (0, 1),
        (1, 2),
        (2, 4),
        (3, 4),
    ]


def test_rows_of_heads_that_do_not_fit_are_passed_over() -> None:
    model = nn.Module()
    model.class_embed = nn.ModuleList([nn.Linear(4, 2)])
    before = model.class_embed[0].weight.detach().clone()
    heads = {"class_embed.0.weight": torch.ones(3, 5), "class_embed.7.weight": torch.ones(3, 4)}
    assert copy_rows(model, heads, [(0, 2)]) == []
    assert torch.equal(model.class_embed[0].weight, before)


@pytest.mark.parametrize("family", ["co", "dino"])
def test_the_rates_of_the_recipe_leave_heads_and_queries_at_the_full_one(family: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "configs" / "README.md").read_text()
    names = next(line.split() for line in text.split("`") if line.startswith("--lr_backbone_names"))
    args = tiny_args(f"{FAMILIES[family]} --lr 1 --lr_backbone 0.1 {' '.join(names)}")
    model = build_detector(args)
    optimizer = build_optimizer(args, model, build_criterion(args))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    full = {".".join(n.split(".")[:3]) for n, p in model.named_parameters() if rates.get(id(p)) == 1}
    slow = {".".join(n.split(".")[:3]) for n, p in model.named_parameters() if rates.get(id(p)) == 0.1}
    heads = {"transformer.decoder.class_embed", "transformer.decoder.bbox_embed"}
    assert heads <= full and not heads & slow
    assert {"backbone.0.body", "transformer.encoder.layers", "transformer.decoder.layers"} <= slow
    assert not any(n.startswith(("backbone", "input_proj", "transformer.encoder")) for n in full)


def test_a_file_that_brings_the_backbone_saves_its_download(file_of) -> None:
    path, _ = file_of("")
    assert brings_backbone(path, "resnet18")
    assert not brings_backbone(path, "resnet50") and not brings_backbone("", "resnet18")


@pytest.mark.parametrize(("backbone", "expected"), [("resnet18", "checkpoint"), ("resnet34", "default")])
def test_starting_from_a_file_downloads_only_another_backbone(
    file_of, monkeypatch: pytest.MonkeyPatch, backbone: str, expected: str
) -> None:
    path, _ = file_of("")
    seen = []

    class Stop(Exception):
        pass

    def build(args):
        seen.append(args.backbone_weights)
        raise Stop

    monkeypatch.setattr(main, "build_model", build)
    words = "--dataset_file synthetic --synthetic_train 2 --synthetic_val 2 --device cpu --backbone_weights default"
    with pytest.raises(Stop):
        main.main([*words.split(), "--init_from", path, "--backbone", backbone])
    assert seen == [expected]
