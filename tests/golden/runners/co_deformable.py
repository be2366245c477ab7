"""Co-Deformable-DETR: weights under the published names, converted and loaded, against the published numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from models import build_model
from models.aux_heads import atss, dense, sampling
from models.aux_heads.rpn import ProposalRule
from models.criterion import Criterion
from models.detector import Detector
from models.postprocess import PostProcessor
from tests.golden.case import difference
from tests.golden.fill import draw, image
from tests.golden.runners.co_deformable_training import check_training, own_names
from tests.golden.runners.co_queries import keys_in_order
from tests.golden.runners.co_stored import ABSOLUTE, BOX_PIXELS, Stored, subsample
from tests.golden.runners.common import parse_flags
from util.checkpoint import load_weights
from util.structures import DetectorOutput, ImageBatch, Memory

# Allowed difference of scores after soft-NMS. The published code tells classes apart by shifting boxes by up to 15000
# pixels, which rounds them by 0.0005: the stored factors 1 - IoU are off by as much as this allows.
SOFTENED = 5e-4
# Beginnings of the names of stored detections.
DETECTIONS = {"one2one": "det", "atss": "atssdet", "faster_rcnn": "rcnndet"}


def official_state(meta: dict) -> dict[str, Tensor]:
    """Return the state dict of the case as a published file holds it.

    Shared branches are drawn once, under the last index, and a file lists them under the index of every layer.
    """
    seed, layers = meta["weights"]["seed"], meta["model"]["dec_layers"]
    state = {name: torch.from_numpy(draw(name, tuple(shape), seed)) for name, shape in meta["weights"]["tensors"]}
    if "shared" in meta["weights"]:
        pattern = rf"(query_head\.(?:cls|reg)_branches)\.{layers - 1}\.(.+)"
        for name, value in list(state.items()):
            found = re.fullmatch(pattern, name)
            if found:
                state.update({f"{found[1]}.{i}.{found[2]}": value for i in range(layers)})
    return state


def build(meta: dict) -> tuple[Detector, Criterion]:
    """Return model and criterion of a case; the auxiliary heads can be evaluated."""
    model = meta["model"]
    flags = {
        "backbone": "resnet50",
        "two_stage": model["two_stage"],
        "with_box_refine": model["box_refine"],
        "mixed_selection": model["mixed_selection"],
        "look_forward_twice": model["look_forward_twice"],
        "enc_layers": model["enc_layers"],
        "dec_layers": model["dec_layers"],
        "num_feature_levels": model["levels"],
        "num_queries_one2one": model["num_queries"],
        "num_classes": model["num_classes"],
        "dim_feedforward": 2048,
        "dropout": 0.0,
        "aux_heads": model["aux_heads"],
        "lambda1": model["lambda_1"],
        "lambda2": model["lambda_2"],
        "eval_head": model["aux_heads"][0],  # keeps the scheme alive in test mode
    }
    detector, criterion, _ = build_model(parse_flags(flags))
    if "faster_rcnn" in model["aux_heads"]:
        reduce_sizes(detector, model["reduced"])
    return detector, criterion


def make_images(meta: dict) -> ImageBatch:
    """Return the images of the case, in the corner of a batch of zeros."""
    inputs = meta["inputs"]
    sizes = [(entry["height"], entry["width"]) for entry in inputs["images"]]
    pixels = torch.zeros(len(sizes), 3, *inputs["batch_shape"])
    padding = torch.ones(len(sizes), *inputs["batch_shape"], dtype=torch.bool)
    for i, ((height, width), entry) in enumerate(zip(sizes, inputs["images"])):
        pixels[i, :, :height, :width] = image(height, width, entry["seed"])
        padding[i, :height, :width] = False
    return ImageBatch(pixels, padding, sizes)


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    stored, state, images = Stored(arrays), official_state(meta), make_images(meta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "random_keys", keys_in_order)
        model, criterion = build(meta)
        load_weights(model, state)
        if "test.cls_last" in stored:
            check_test(model, meta["model"]["reduced"]["test"], images, stored.part("test."))
        names = own_names(state, model)
        for step, content in meta["train"].items():
            check_training(model, criterion, images, content, stored.part(f"{step}."), names)
    assert not stored.unread, f"stored, but not compared: {sorted(stored.unread)}"


def reduce_sizes(model: Detector, reduced: dict) -> None:
    """Give the two-stage head the smaller numbers of a case."""
    head, test = model.groups["co"].heads["faster_rcnn"], reduced["test"]
    head.rpn.settings = replace(
        head.rpn.settings,
        samples=reduced["rpn_sampler_num"],
        training=ProposalRule(reduced["train_rpn_proposal"]["nms_pre"], reduced["train_rpn_proposal"]["max_per_img"]),
        testing=ProposalRule(test["rpn_nms_pre"], test["rpn_max_per_img"]),
    )
    head.roi.settings = replace(head.roi.settings, samples=reduced["roi_sampler_num"], keep=test["rcnn_max_per_img"])


@torch.no_grad()
def check_test(model: Detector, sizes: dict, images: ImageBatch, stored: Stored, soft_nms_iou: float = 0.0) -> None:
    """Compare the three ways to evaluate: decoder, ATSS head, two-stage head; heads have NMS of their own."""
    with pytest.MonkeyPatch.context() as patch:
        fewer = partial(dense.detect, per_level=sizes["atss_nms_pre"], topk=sizes["atss_max_per_img"])
        patch.setattr(atss, "detect", fewer)
        output = check_detector(model, images, stored)
        for name in model.groups["co"].heads:
            model.groups["co"].evaluated = name
            output.aux_detections |= model(images).aux_detections
    for name in ("one2one", *model.groups["co"].heads):
        soft = soft_nms_iou if name == "one2one" else 0.0
        postprocessor = PostProcessor(sizes["detr_max_per_img"], soft_nms_iou=soft, clip=True, group=name)
        check_detections(postprocessor, output, images, stored.part(DETECTIONS[name]), SOFTENED if soft else ABSOLUTE)


@torch.no_grad()
def check_detector(model: Detector, images: ImageBatch, stored: Stored) -> DetectorOutput:
    """Return what the detector says in test mode, once neck, encoder, extra level and decoder are compared."""
    maps: dict[int, Tensor] = {}
    memories: list[Memory] = []
    handles = [
        projection.register_forward_hook(lambda module, inputs, output, i=i: maps.update({i: output}))
        for i, projection in enumerate(model.input_proj)
    ]
    extra: list[Tensor] = []
    encoder, downsample = model.transformer.encoder, model.groups["co"].downsample
    handles.append(encoder.register_forward_hook(lambda module, inputs, output: memories.append(output)))
    handles.append(downsample.register_forward_hook(lambda module, inputs, output: extra.append(output)))
    try:
        output = model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    for level, projected in maps.items():
        stored.close(f"neck{level}_sub", subsample(projected))
    (memory,) = memories
    parts = memory.tokens.split([h * w for h, w in memory.shapes], 1)
    for level, (tokens, shape) in enumerate(zip(parts, memory.shapes)):
        stored.close(f"enc{level}_sub", subsample(tokens.transpose(1, 2).unflatten(2, shape)))
    stored.close(f"enc{len(parts)}_sub", subsample(extra[0]))
    check_predictions(output, stored)
    return output


def check_predictions(output: DetectorOutput, stored: Stored) -> None:
    """Compare the logits and boxes of all decoder layers, and in two-stage what the encoder says.

    That are scores of all tokens, or scores and boxes of those that are chosen.
    """
    found = output.sets["one2one"].predictions
    if "topk_box" in stored:
        proposed = output.sets["interm"].predictions
        stored.close("topk_cls_sub", subsample(proposed.logits))
        stored.close("topk_box", proposed.boxes[0])
    if "enc_cls0" in stored:
        stored.close("enc_cls0", output.sets["encoder"].predictions.logits[0, ..., 0])
    stored.close("cls_last", found.logits[-1])
    stored.close("cls_sub", subsample(found.logits, 8000))
    stored.close("box", found.boxes)


def check_detections(
    postprocessor: PostProcessor, output: DetectorOutput, images: ImageBatch, stored: Stored, tolerance: float
) -> None:
    """Compare the best detections of each image, (x1, y1, x2, y2, score), clipped to it; `tolerance` is of scores."""
    for i, detections in enumerate(postprocessor(output, images.sizes, range(len(images.sizes)))):
        want, name = stored.take(f"{i}_boxes"), f"{stored.prefix}{i}_boxes"
        stored.same(f"{i}_labels", detections.labels)
        assert difference(detections.boxes_px, want[:, :4]) <= BOX_PIXELS, name
        assert difference(detections.scores, want[:, 4]) <= tolerance, f"{name}: scores"
