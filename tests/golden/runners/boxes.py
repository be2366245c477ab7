"""Box arithmetic, focal loss, and the conversion of predictions to detections."""

from __future__ import annotations

import re

import numpy as np
import torch

from models.losses import focal_classification
from models.postprocess import PostProcessor
from tests.golden.case import same_detections
from tests.golden.runners.common import assert_close, subcases
from util.boxes import cxcywh_to_xyxy, inverse_sigmoid, paired_giou, pairwise_iou
from util.structures import Assignment, Predictions, TargetPairs


def run_box_ops(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    tolerance = meta["tolerances"]["absolute"]
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    a, b = cxcywh_to_xyxy(tensors["a"]), cxcywh_to_xyxy(tensors["b"])
    assert_close("corner form", a, arrays["a_xyxy"], tolerance)
    assert_close("IoU", pairwise_iou(a, b), arrays["iou"], tolerance)
    assert_close("GIoU of all pairs", paired_giou(a[:, None], b), arrays["giou"], tolerance)
    rows, columns = np.indices(arrays["giou"].shape).reshape(2, -1)
    assert_close("GIoU of pairs", paired_giou(a[rows], b[columns]), arrays["giou"].reshape(-1), tolerance)
    inter = arrays["iou"] * arrays["union"]
    area_a, area_b = tensors["a"][:, 2:].prod(1), tensors["b"][:, 2:].prod(1)
    assert_close("union", area_a[:, None] + area_b[None] - torch.from_numpy(inter), arrays["union"], tolerance)
    assert_close(
        "inverse sigmoid", inverse_sigmoid(tensors["inverse_sigmoid_in"]), arrays["inverse_sigmoid_out"], tolerance
    )
    _focal(meta["about"], tensors, arrays, tolerance)


def _focal(about: str, tensors: dict[str, torch.Tensor], arrays: dict[str, np.ndarray], tolerance: float) -> None:
    settings = {"alpha": 0.25, "gamma": 2.0, "num_boxes": 3.0}
    settings |= {name: float(n) for name, n in re.findall(r"\b(alpha|gamma|num_boxes)\W+(\d+(?:\.\d+)?)", about)}
    num_boxes = settings.pop("num_boxes")
    logits = tensors["focal.logits"].clone().requires_grad_()
    image, slot, label = tensors["focal.targets"].nonzero(as_tuple=True)
    zeros = torch.zeros_like(image)
    predictions = Predictions(logits[None], torch.zeros(1, *logits.shape[:2], 4))
    pairs = TargetPairs(label, torch.zeros(len(label), 4))
    assignment = Assignment(zeros, image, slot, zeros)
    loss = focal_classification(predictions, pairs, assignment, **settings)["loss_ce"][0].sum()
    # The stored loss is a mean over queries, a sum over the rest, divided by num_boxes; ours is the sum.
    loss = loss / logits.shape[1] / num_boxes
    assert_close("focal loss", loss, arrays["focal.loss"], tolerance)
    loss.backward()
    assert_close("gradient of the focal loss", logits.grad, arrays["focal.grad"], tolerance)


def run_postprocess(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    tolerances = meta["tolerances"]
    for name, stored in subcases(arrays).items():
        settings = meta["subcases"][name]
        logits, boxes = torch.from_numpy(stored["in.pred_logits"]), torch.from_numpy(stored["in.pred_boxes"])
        sizes = [tuple(s) for s in settings["target_sizes_hw"]]
        found = PostProcessor(settings["topk"]).select(logits, boxes, sizes, range(len(sizes)))
        for image, detections in enumerate(found):
            want = {key: stored[f"{image}.{key}"] for key in ("scores", "labels", "boxes")}
            ours = {"scores": detections.scores, "labels": detections.labels, "boxes": detections.boxes_px}
            message = f"{name}: detections of image {image} differ"
            assert same_detections(ours, want, tolerances["scores"], tolerances["boxes"]), message
