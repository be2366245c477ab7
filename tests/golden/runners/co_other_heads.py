"""RetinaNet, FCOS, PAA and GFL as auxiliary heads, on given features: assignment and losses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.aux_heads.base import AuxHead, Objects, Pyramid, Samples
from models.aux_heads.dense import distances
from models.aux_heads.fcos import FCOSHead
from models.aux_heads.gfl import GFLHead
from models.aux_heads.paa import PAAHead
from models.aux_heads.retinanet import RetinaNetHead
from tests.golden.fill import draw
from tests.golden.runners.co_inputs import make_objects, make_pyramid

HEADS = {head.name: head for head in (RetinaNetHead, FCOSHead, PAAHead, GFLHead)}
# The keyword of each loss weight that a head's settings may give; "centerness" is PAA's IoU there.
WEIGHTS = {
    "loss_cls": "class_weight",
    "loss_bbox": "box_weight",
    "loss_centerness": "centerness_weight",
    "loss_dfl": "distribution_weight",
}


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    assert meta["heads"].keys() == HEADS.keys()
    results = {}
    for name, settings in meta["heads"].items():
        head = _head(name, settings, meta)
        pyramid, objects = make_pyramid(meta, 256, _strides(settings)), make_objects(meta)
        with torch.no_grad():
            output = head(pyramid, objects)
        results |= {f"{name}.{key}": value for key, value in output.losses.items()}
        if name == "fcos":
            results |= _points(output.samples, head, pyramid, objects)
        else:
            results |= _anchors(output.samples, name, objects)
    for name in ("paa.pos_targets0", "paa.pos_targets1"):  # not stored: the labels say which objects
        del results[name]
    assert results.keys() == arrays.keys(), f"stored and not compared, or the reverse: {results.keys() ^ arrays.keys()}"
    for key, stored in arrays.items():
        ours, loss = results[key].numpy(), ".loss_" in key
        if np.issubdtype(stored.dtype, np.integer):
            np.testing.assert_array_equal(ours, stored, err_msg=key)
        else:
            np.testing.assert_allclose(
                ours, stored, rtol=2e-4 if loss else 1e-4, atol=1e-6 if loss else 1e-4, err_msg=key
            )


def _strides(settings: dict) -> list[int]:
    return settings["strides"] if "strides" in settings else settings["anchor_generator"]["strides"]


def _head(name: str, settings: dict, meta: dict) -> AuxHead:
    keywords = {WEIGHTS[key]: value["loss_weight"] for key, value in settings.items() if key in WEIGHTS}
    if name == "paa":
        keywords["iou_weight"] = keywords.pop("centerness_weight")
    head = HEADS[name](
        num_classes=settings["num_classes"],
        width=settings["feat_channels"],
        strides=_strides(settings),
        stacked_convs=settings["stacked_convs"],
        **keywords,
    )
    prefix, seed = meta["weights"][name]["prefix"], meta["weights"][name]["seed"]
    state = {
        key.removeprefix(prefix): torch.from_numpy(draw(key, tuple(shape), seed))
        for key, shape in meta["weights"][name]["tensors"]
    }
    head.load_state_dict(state)
    return head


def _anchors(samples: Samples, name: str, objects: Objects) -> dict[str, Tensor]:
    """Return the positives of each image."""
    results = {}
    for image, (positive, target) in enumerate(zip(samples.positive, samples.target)):
        results |= {
            f"{name}.pos{image}": positive.nonzero()[:, 0],
            f"{name}.pos_labels{image}": objects.labels[image][target[positive]],
            f"{name}.pos_targets{image}": objects.boxes[image][target[positive]],
        }
    return results


def _points(samples: Samples, head: FCOSHead, pyramid: Pyramid, objects: Objects) -> dict[str, Tensor]:
    """Return the positives of each level, counted over the points of all images, and their sides in strides."""
    counts = head.grid.level_counts(pyramid.shapes)
    points = samples.boxes.unflatten(-1, (2, 2)).mean(-2)
    boxes = objects.boxes.gather(1, samples.target[..., None].expand(-1, -1, 4))
    labels, sides = objects.labels.gather(1, samples.target), distances(points, boxes)
    results = {}
    split = [values.split(counts, dim=1) for values in (samples.positive, labels, sides)]
    for level, (positive, label, side) in enumerate(zip(*split)):
        positive = positive.flatten()
        results |= {
            f"fcos.pos_level{level}": positive.nonzero()[:, 0],
            f"fcos.pos_labels_level{level}": label.flatten()[positive],
            f"fcos.pos_ltrb_level{level}": side.flatten(0, 1)[positive] / pyramid.strides[level],
        }
    return results
