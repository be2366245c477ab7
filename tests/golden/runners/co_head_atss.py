"""The ATSS head of Co-DETR on given features: outputs, anchors, assignment, losses and detections."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.aux_heads.atss import ATSSHead
from models.aux_heads.base import Objects, Pyramid
from tests.golden.fill import draw
from tests.golden.runners.co_inputs import make_objects, make_pyramid

PREFIX = "bbox_head.0."
FACTOR = 12  # decoder layers times the weight of encoder losses: part of the stored losses


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    names = [name.removeprefix(PREFIX) for name, _ in meta["weights"]["tensors"]]
    weights = [draw(name, tuple(shape), meta["weights"]["seed"]) for name, shape in meta["weights"]["tensors"]]
    strides = [meta["batch_shape"][0] // height for height, _ in meta["levels"]]
    head = ATSSHead(num_classes=meta["num_classes"], width=weights[0].shape[1], strides=strides)
    head.load_state_dict(dict(zip(names, map(torch.from_numpy, weights))))
    pyramid, objects = make_pyramid(meta, weights[0].shape[1], strides), make_objects(meta)
    with torch.no_grad():
        results = {
            **_losses_and_assignment(head, pyramid, objects),
            **_outputs(head, pyramid),
            **_detections(head, pyramid, len(arrays["det0_labels"])),
        }
    assert results.keys() == arrays.keys(), f"stored and not compared, or the reverse: {results.keys() ^ arrays.keys()}"
    for key, stored in arrays.items():
        ours, loss = np.asarray(results[key]), key.startswith("loss.")
        if np.issubdtype(stored.dtype, np.integer):
            np.testing.assert_array_equal(ours, stored, err_msg=key)
        else:
            np.testing.assert_allclose(
                ours, stored, rtol=2e-4 if loss else 1e-4, atol=1e-6 if loss else 1e-4, err_msg=key
            )


def _losses_and_assignment(head: ATSSHead, pyramid: Pyramid, objects: Objects) -> dict[str, Tensor | int]:
    output = head(pyramid, objects)
    results = {f"loss.{name}": FACTOR * value for name, value in output.losses.items()}
    samples = output.samples
    usable = head.grid.usable(pyramid.shapes, pyramid.usable, "cpu")
    for image, (positive, target) in enumerate(zip(samples.positive, samples.target)):
        objects_of_positives = target[positive]
        results |= {
            f"pos{image}": positive.nonzero()[:, 0],
            f"num_pos{image}": positive.sum(),
            f"num_valid{image}": usable[image].sum(),
            f"num_anchors{image}": len(positive),
            f"pos_anchors{image}": samples.boxes[image][positive],
            f"assigned_gt_plus1_{image}": objects_of_positives + 1,
            f"pos_labels{image}": objects.labels[image][objects_of_positives],
            f"pos_targets{image}": objects.boxes[image][objects_of_positives],
        }
    return results


def _outputs(head: ATSSHead, pyramid: Pyramid) -> dict[str, Tensor]:
    """Return what the head says about each level as maps, in the way the case thins them out."""
    counts = head.grid.level_counts(pyramid.shapes)
    anchors = head.grid.anchors(pyramid.shapes, "cpu").split(counts)
    results = {"anchors_first_of_level": torch.stack([level[0] for level in anchors])}
    logits, deltas, centerness = head.outputs(pyramid)
    for name, values in (("cls", logits), ("reg", deltas), ("ctr", centerness[..., None])):
        for level, (part, shape) in enumerate(zip(values.split(counts, dim=1), pyramid.shapes)):
            flat = part.unflatten(1, shape).permute(0, 3, 1, 2).flatten()
            results[f"{name}{level}_sub"] = flat[:: max(1, len(flat) // 1500)]
    return results


def _detections(head: ATSSHead, pyramid: Pyramid, count: int) -> dict[str, Tensor]:
    results = {}
    for image, found in enumerate(head.predict(pyramid)):
        assert len(found.scores) <= 100, f"image {image}: {len(found.scores)} detections, at most 100 are kept"
        results[f"det{image}_boxes"] = torch.cat([found.boxes_px, found.scores[:, None]], 1)[:count]
        results[f"det{image}_labels"] = found.labels[:count]
    return results
