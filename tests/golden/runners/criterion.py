"""All losses on stored predictions, without a model."""

from __future__ import annotations

import numpy as np
import torch

from models import build_criterion
from models.detector import ENCODER_SUPERVISION
from tests.golden.runners.common import assert_close, assert_relative, make_target, parse_flags, subcases
from util.structures import DetectorOutput, Predictions, SupervisedSet, Supervision


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for name, stored in subcases(arrays).items():
        _subcase(name, meta["subcases"][name], stored, meta["tolerances"])


def _subcase(name: str, settings: dict, stored: dict[str, np.ndarray], tolerances: dict) -> None:
    leaves = {key[3:]: torch.from_numpy(v).requires_grad_() for key, v in stored.items() if key.startswith("in.")}
    sets = {"one2one": SupervisedSet(_stack(leaves, ""), (Supervision(),))}
    if "enc.pred_logits" in leaves:
        encoder = Predictions(leaves["enc.pred_logits"][None], leaves["enc.pred_boxes"][None])
        sets["encoder"] = SupervisedSet(encoder, ENCODER_SUPERVISION)
    if "k" in settings:
        supervision = Supervision(repeat=settings["k"], weight=settings["lambda"])
        sets["one2many"] = SupervisedSet(_stack(leaves, "many"), (supervision,))
    targets = [
        make_target(stored[f"targets.{i}.labels"], stored[f"targets.{i}.boxes"]) for i in range(len(settings["counts"]))
    ]
    report = build_criterion(parse_flags({}))(DetectorOutput(sets), targets)
    assert set(report.terms) == set(settings["loss_names"]), f"{name}: other entries than the published log has"
    for key in settings["loss_names"]:
        assert_relative(f"{name} {key}", report.terms[key], stored[f"loss.{key}"], tolerances["loss_relative"])
        assert report.weights.get(key, None) == settings["weights"].get(key, None), f"{name}: weight of {key}"
    assert_relative(f"{name} total", report.total, stored["total"], tolerances["loss_relative"])
    report.total.backward()
    for key, want in stored.items():
        if key.startswith("grad."):
            assert_close(f"{name} {key}", leaves[key[5:]].grad, want, tolerances["gradient_absolute"])


def _stack(leaves: dict[str, torch.Tensor], kind: str) -> Predictions:
    """Return the layers of one set, first layer first; its last layer has no number in the stored names."""
    last, aux = _names(leaves, kind)
    logits = [leaves[f"{n}pred_logits"] for n in [*aux, last]]
    boxes = [leaves[f"{n}pred_boxes"] for n in [*aux, last]]
    return Predictions(torch.stack(logits), torch.stack(boxes))


def _names(leaves: dict[str, torch.Tensor], kind: str) -> tuple[str, list[str]]:
    prefixes = [key[: -len("pred_logits")] for key in leaves if key.endswith("pred_logits")]
    mine = [p for p in prefixes if ("many" in p) == (kind == "many") and not p.startswith("enc.")]
    aux = sorted((p for p in mine if "aux" in p), key=lambda p: (len(p), p))  # aux2 before aux10
    (last,) = [p for p in mine if "aux" not in p]
    return last, aux
