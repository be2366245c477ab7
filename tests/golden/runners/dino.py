"""DAB-Deformable-DETR and DINO: names of checkpoints, whole models with replayed denoising noise, and their parts."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from main import get_args_parser
from models import build_detector, build_model, proposals
from models.criterion import Criterion
from models.detector import Detector
from models.groups import denoising
from models.groups.denoising import Denoising, Noise
from models.position_encoding import SinePositionEncoding, sine_embed_boxes
from models.visibility import visibility
from tests.golden import case
from tests.golden.runners.common import assert_close, assert_relative, make_target
from tests.golden.runners.detector import _watch_matching
from util.boxes import cxcywh_to_xyxy, inverse_sigmoid, paired_giou
from util.checkpoint import load_weights
from util.convert import to_native
from util.structures import DetectorOutput, FlatTargets, ImageBatch, QueryGroup, Supervision, Target

BOXES = "--with_box_refine --query_pos box --logit_eps 1e-3 --giou_eps 1e-6 --cls_loss_coef 1 --dropout 0 "
DAB = BOXES + "--query_scale --dim_feedforward 2048"
DINO = (
    BOXES + "--two_stage --mixed_selection --look_forward_twice --decoder_norm --share_heads --dim_feedforward 2048 "
    "--pe_temperature 20 --no-pe_half_cell"
)


def args_of(flags: str) -> Namespace:
    return get_args_parser().parse_args(f"--backbone_weights none {flags}".split())


# whole models


def run_model(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    model, criterion, postprocessor = build_model(args_of(_flags(meta["model"], arrays)))
    load_weights(model, case.checkpoint(meta))
    _check_names(model, [name for name, *_ in meta["checkpoint"]], meta["aliases"])
    pixels, padding = case.batch(meta)
    sizes = [tuple(size) for size in meta["inputs"]["image_sizes_hw"]]
    images = ImageBatch(pixels, padding, sizes)
    targets = [make_target(t["labels"], t["boxes"], size, i) for i, (t, size) in enumerate(zip(meta["targets"], sizes))]
    unread = set(arrays)
    if "eval_logits" in arrays:
        unread -= _check_evaluation(meta, arrays, model.eval(), postprocessor, images)
    unread -= _check_training(meta, arrays, model.train(), criterion, images, targets)
    assert not unread, f"stored, but not compared: {sorted(unread)}"


def _flags(model: dict, arrays: dict[str, np.ndarray]) -> str:
    """Return the command line of a model; everything that is stored about it is said or checked."""
    flags = {
        "num_classes": model["num_classes"],
        "num_queries": model["num_queries"],
        "num_feature_levels": model["levels"],
        "enc_layers": model["enc_layers"],
        "dec_layers": model["dec_layers"],
        "dim_feedforward": model["dim_feedforward"],
        "dropout": model["dropout"],
        "nheads": model["heads"],
        "enc_n_points": model["points"],
        "dec_n_points": model["points"],
    }
    if model["family"] == "DINO":
        assert model["shared_decoder_heads"] and model["embed_init_tgt"]
        strides = model["feature_strides"]
        flags |= {
            "dn_number": model["dn_number"],
            "dn_box_noise_scale": model["dn_box_noise_scale"],
            "dn_label_noise_ratio": model["dn_label_noise_ratio"],
            "dn_labelbook_size": model["label_embedding_rows"] - 1,
            "topk": arrays["post_scores"].shape[1] if "post_scores" in arrays else 300,
            "return_interm_indices": "0 1 2 3" if strides[0] == 4 else "1 2 3",
        }
    else:
        flags |= {"num_patterns": model["num_patterns"]}
    return (DINO if model["family"] == "DINO" else DAB) + "".join(f" --{k} {v}" for k, v in flags.items())


def _check_names(model: Detector, published: list[str], aliases: dict[str, str]) -> None:
    """The state dict holds the names of the published file, once for every name of a tensor."""
    assert set(model.state_dict()) == {*published, *aliases}


def _check_evaluation(meta: dict, arrays: dict, model: Detector, postprocessor, images: ImageBatch) -> set[str]:
    tolerances, seen = meta["tolerances"]["absolute"], set()

    def close(key: str, ours: Tensor) -> None:
        seen.add(key)
        assert_close(key, ours.detach(), arrays[key], tolerances[key])

    with _references(model) as references, _selection(arrays) as selected, torch.no_grad():
        output, memory = model(images), model.encode(images)
    found = output.sets["one2one"].predictions
    close("eval_logits", found.logits)
    close("eval_boxes", found.boxes)
    close("eval_memory_slice", memory.tokens[:, ::13, ::16])
    if "interm" in output.sets:
        close("eval_references", torch.stack(references))
        interm = output.sets["interm"].predictions
        close("eval_interm_logits", interm.logits[0])
        close("eval_interm_boxes", interm.boxes[0])
        prior, _ = proposals.proposal_logits(memory.padding, memory.shapes)
        index = selected["index"]
        close("eval_proposal_boxes", proposals.gather_rows(prior, index).sigmoid())
        close("eval_token_scores", selected["scores"])
        seen.add("eval_topk_tokens")
        assert (index.numpy() == arrays["eval_topk_tokens"]).all(), "other tokens are selected"
    else:
        close("eval_inter_references", torch.stack(references[1:]))
    seen |= _check_detections(meta, arrays, postprocessor(output, images.sizes, range(len(images))))
    return seen


def _check_detections(meta: dict, arrays: dict, detections: list) -> set[str]:
    bounds = meta["tolerances"]["absolute"]
    for i, found in enumerate(detections):
        want = {key: arrays[f"post_{key}"][i] for key in ("scores", "labels", "boxes")}
        ours = {"scores": found.scores, "labels": found.labels, "boxes": found.boxes_px}
        assert case.same_detections(ours, want, bounds["post_scores"], bounds["post_boxes"]), f"image {i}"
    return {"post_scores", "post_labels", "post_boxes"}


@contextmanager
def _references(model: Detector) -> Iterator[list[Tensor]]:
    """Collect the boxes before the first layer and after every layer, refined with what the layer itself returns."""
    decoder, found = model.transformer.decoder, []
    heads = model.heads.bbox_embed

    def start(module, inputs) -> None:
        if not found:
            found.append(torch.cat([group.reference for group in inputs[0]], 1))

    def refine(module, inputs, output) -> None:
        delta = heads[len(found) - 1](output)
        found.append((delta + inverse_sigmoid(found[-1], decoder.eps)).sigmoid())

    handles = [decoder.register_forward_pre_hook(start)]
    handles += [layer.register_forward_hook(refine) for layer in decoder.layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _selection(arrays: dict) -> Iterator[dict[str, Tensor]]:
    """Collect what proposals are ranked by, and which are chosen."""
    original, found = proposals.select_top, {}

    def watching(scores: Tensor, count: int) -> Tensor:
        found["scores"], found["index"] = scores, original(scores, count)
        return found["index"]

    proposals.select_top = watching
    try:
        yield found
    finally:
        proposals.select_top = original


@contextmanager
def replayed(noise: Noise) -> Iterator[None]:
    """Let denoising queries have this noise."""
    original = denoising.draw_noise

    def draw(groups: int, objects: int, classes: int, device: torch.device) -> Noise:
        assert (groups, 2, objects) == tuple(noise.label.shape), f"{groups} groups, stored {len(noise.label)}"
        return noise

    denoising.draw_noise = draw
    try:
        yield
    finally:
        denoising.draw_noise = original


def _noise(arrays: dict, prefix: str) -> Noise:
    names = ("label_u", "label_new", "box_sign", "box_u")
    label, new_label, sign, size = (torch.from_numpy(arrays[prefix + name]) for name in names)
    return Noise(label, new_label.long(), sign, size)


def _check_training(
    meta: dict, arrays: dict, model: Detector, criterion: Criterion, images: ImageBatch, targets: list[Target]
) -> set[str]:
    tolerances, seen = meta["tolerances"]["absolute"], set()

    def close(key: str, ours: Tensor) -> None:
        seen.add(key)
        assert_close(key, ours.detach(), arrays[key], tolerances[key])

    if "dn_label_u" in arrays:
        with replayed(_noise(arrays, "dn_")), watched_groups(model) as groups:
            output = model(images, targets)
        seen |= {"dn_label_u", "dn_label_new", "dn_box_sign", "dn_box_u", "dn_query_box_unact"}
        queries = next(group for group in groups if group.name == "dn")
        close("dn_query_content", queries.content[..., ::16])
        key = "dn_query_box_unact"
        check_boxes(key, queries.reference, arrays[key], tolerances[key])
        check_mask(queries, next(g for g in groups if g.name == "one2one"), arrays["dn_attn_mask"])
        seen.add("dn_attn_mask")
        for prefix, name in (("train_", "one2one"), ("train_dn_", "dn")):
            if f"{prefix}logits" in arrays:
                close(f"{prefix}logits", output.sets[name].predictions.logits[-1])
                close(f"{prefix}boxes", output.sets[name].predictions.boxes[-1])
    else:
        output = model(images, targets)
    _check_losses(meta, model, criterion, output, targets)
    return seen


def check_boxes(key: str, boxes: Tensor, logits: np.ndarray, tolerance: float) -> None:
    """Compare boxes with stored logits; a logit that is off by d moves the box by up to d / 4."""
    assert_close(key, boxes, torch.from_numpy(logits).sigmoid(), tolerance / 4)


@contextmanager
def watched_groups(model: Detector) -> Iterator[list[QueryGroup]]:
    """Collect what is decoded."""
    found: list[QueryGroup] = []
    handle = model.transformer.decoder.register_forward_pre_hook(lambda module, inputs: found.extend(inputs[0]))
    try:
        yield found
    finally:
        handle.remove()


def check_mask(queries: QueryGroup, matching: QueryGroup, stored: np.ndarray) -> None:
    groups = [queries, matching]
    seen = visibility(groups, torch.device("cpu"))
    side = len(queries) + len(matching)
    blocked = torch.zeros(side, side, dtype=torch.bool) if seen is None else ~seen
    want = stored if stored.ndim == 2 else np.unpackbits(stored)[: side * side].reshape(side, side)
    assert (blocked.numpy() == want.astype(bool)).all(), "other queries are hidden"


def _check_losses(meta: dict, model: Detector, criterion: Criterion, output: DetectorOutput, targets: list) -> None:
    with _watch_matching(criterion) as matched:
        report = criterion(output, targets)
    _check_matches(meta["matches"], matched, len(targets))
    tolerance = meta["tolerances"]["losses_relative"]
    for key, want in meta["losses"].items():
        if key == "total":
            assert_relative(key, report.total, want, tolerance)
        elif not key.startswith(("loss_xy", "loss_hw")):  # parts of loss_bbox that were only logged
            assert_relative(key, report.terms[_our_key(key)], want, tolerance)
    assert report.weights == {_our_key(key): weight for key, weight in meta["loss_weights"].items()}
    model.zero_grad()
    report.total.backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    bound = meta["tolerances"]["grad_norms_relative"]
    for name, want in meta["grad_norms"].items():
        if name == "total_norm":
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            assert_relative(name, torch.stack(norms).norm(), want, bound)
        else:
            gradient = parameters[name].grad
            assert_relative(name, 0.0 if gradient is None else gradient.norm(), want, bound)


def _our_key(key: str) -> str:
    """Return `loss_ce_0_dn` for `loss_ce_dn_0`: we name the layer first, as H-DETR does."""
    return re.sub(r"_dn_(\d+)$", r"_\1_dn", key)


def _check_matches(stored: dict, matched: dict, images: int) -> None:
    for name, (request, assignment) in matched.items():
        layers = request.predictions.layers
        for layer in range(layers):
            key = "interm" if name == "interm" else "last" if layer == layers - 1 else f"aux{layer}"
            for image in range(images):
                here = (assignment.layer == layer) & (assignment.image == image)
                ours = assignment.slot[here] - request.slots.start, assignment.target[here]
                assert [x.tolist() for x in ours] == stored[key][image], f"{key}, image {image}: other pairs"


# parts


def run_parts(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    tolerances, stored = meta["tolerances"]["absolute"], {k: torch.from_numpy(v) for k, v in arrays.items()}
    x, y, w, h = stored["anchors"].unbind(-1)
    width = stored["anchor_embedding"].shape[1] // 4
    embedded = sine_embed_boxes(torch.stack([y, x, w, h], -1), width)
    assert_close("anchor_embedding", embedded, arrays["anchor_embedding"], tolerances["anchor_embedding"])
    logits = inverse_sigmoid(stored["logit_in"], 1e-3)
    assert_close("logit_out", logits, arrays["logit_out"], tolerances["logit_out"])
    height, width = meta["position_map_hw"]
    padding = torch.ones(len(stored["position_valid_hw"]), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(stored["position_valid_hw"].tolist()):
        padding[i, :h, :w] = False
    encoded = SinePositionEncoding(128, temperature=20.0, shift=0.0)(padding)[:, ::8]
    valid = ~padding[:, None]
    want = arrays["position_embedding"]
    assert_close("position_embedding", encoded * valid, want * valid.numpy(), tolerances["position_embedding"])
    a, b = (cxcywh_to_xyxy(stored[f"giou_{name}_cxcywh"]) for name in "ab")
    assert_close("giou", paired_giou(a[:, None], b[None], 1e-6), arrays["giou"], tolerances["giou"])
    for k, sub in enumerate(meta["denoising"]):
        _check_denoising(sub, arrays, f"dn{k}.", tolerances["boxes_logit"])


def _check_denoising(meta: dict, arrays: dict, prefix: str, tolerance: float) -> None:
    source = Denoising(
        8,
        num_classes=meta["num_classes"],
        rows=meta["num_classes"] + 1,
        layers=1,
        number=meta["dn_number"],
        label_noise=meta["label_noise_ratio"],
        box_noise=meta["box_noise_scale"],
    )
    targets = [make_target(t["labels"], t["boxes"], image_id=i) for i, t in enumerate(meta["targets"])]
    flat, most = FlatTargets.of(targets), max(meta["counts"])
    groups = denoising.number_of_groups(meta["dn_number"], most, always_divide=False)
    assert groups == meta["groups"] and 2 * groups * most == meta["dn_queries"]
    content, reference = source.embed(flat, _noise(arrays, prefix), most)
    labels = torch.from_numpy(arrays[f"{prefix}labels"]).long()
    empty = labels < 0
    wanted = source.published["label_enc"](labels.clamp(min=0)).masked_fill(empty[..., None], 0.0)
    assert torch.equal(content, wanted), f"{prefix}labels"
    check_boxes(f"{prefix}boxes_logit", reference, arrays[f"{prefix}boxes_logit"], tolerance)
    taught = (Supervision(),)
    queries = QueryGroup("dn", content, reference, None, taught, sees=("one2one",), block=2 * most)
    empty_group = content.new_zeros(len(targets), meta["num_queries"], 8)
    matching = QueryGroup("one2one", empty_group, empty_group[..., :4], None, taught)
    check_mask(queries, matching, arrays[f"{prefix}mask"])


# names of released files


def run_checkpoint_names(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for name, published in meta["models"].items():
        shapes = {n: tuple(shape) for n, shape, _ in published["tensors"]}
        model = build_detector(args_of(_flags_of_file(name, shapes)))
        own = {n: tuple(value.shape) for n, value in model.state_dict().items()}
        aliases = {n: shapes[target] for n, target in published["aliases"].items()}
        skipped = ("relative_position_index", "num_batches_tracked")
        file = to_native({n: torch.empty(s, device="meta") for n, s in (shapes | aliases).items()})
        wanted = {n: tuple(value.shape) for n, value in file.items() if not n.endswith(skipped)}
        own = {n: s for n, s in own.items() if not n.endswith(skipped)}
        assert own == wanted, f"{name}: {sorted(set(own.items()) ^ set(wanted.items()))[:6]}"


def _flags_of_file(name: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """Return the flags of a released file, with the sizes that its shapes tell."""
    levels = shapes["transformer.level_embed"][0]
    backbone = "swin_large_window12" if "swin" in name else "resnet50"
    stages = "0 1 2 3" if levels == 5 else "1 2 3"
    queries, _ = shapes.get("transformer.tgt_embed.weight") or shapes["tgt_embed.weight"]
    flags = DAB if name.startswith("dab") else f"{DINO} --dn_number 100"
    flags += f" --num_feature_levels {levels} --backbone {backbone} --return_interm_indices {stages}"
    return f"{flags} --num_classes {shapes['class_embed.0.bias'][0]} --num_queries {queries}"
