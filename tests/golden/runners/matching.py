"""The Hungarian matcher on stored predictions."""

from __future__ import annotations

import numpy as np
import torch

from models.assign import HungarianMatcher, Request
from tests.golden.case import same_matching
from tests.golden.runners.common import assert_close, assert_tied, make_target, subcases
from util.structures import FlatTargets, Predictions, Supervision


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for name, stored in subcases(arrays).items():
        settings = meta["subcases"][name]
        matcher = HungarianMatcher(**{key: settings[key] for key in ("cost_class", "cost_bbox", "cost_giou")})
        targets = [
            make_target(stored[f"targets.{i}.labels"], stored[f"targets.{i}.boxes"])
            for i in range(len(settings["counts"]))
        ]
        logits, boxes = torch.from_numpy(stored["pred_logits"]), torch.from_numpy(stored["pred_boxes"])
        predictions = Predictions(logits[None], boxes[None])
        flat = FlatTargets.of(targets)
        (found,) = matcher([Request(name, predictions, flat, Supervision())])
        costs = matcher.costs(predictions, flat)[:, 0]
        for image, target in enumerate(targets):
            cost = costs[flat.image == image].T
            assert_close(
                f"{name} cost of image {image}", cost, stored[f"cost.{image}"], meta["tolerances"]["cost_absolute"]
            )
            here = found.image == image
            slots, matched = found.slot[here].numpy(), found.target[here].numpy()
            assert (np.diff(slots) > 0).all(), f"{name}: query indices of image {image} are not ascending"
            want = stored[f"match.{image}"]
            if not same_matching((slots, matched), want, len(target)):
                assert_tied(f"{name} image {image}", stored[f"cost.{image}"], (slots, matched), want)
