"""Whole models on drawn weights: outputs, matching, losses, gradients, detections; in training and evaluation mode."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from models import build_model, proposals
from models.assign import HungarianMatcher, Request
from models.criterion import Criterion
from models.detector import Detector
from models.postprocess import PostProcessor
from tests.golden import case
from tests.golden.runners.common import assert_close, assert_relative, assert_tied, make_target, parse_flags
from util.checkpoint import load_weights
from util.structures import Assignment, DetectorOutput, ImageBatch, QueryGroup, Target


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    flags = {**meta["flags"], "dropout": 0.0, "drop_path_rate": 0.0}  # 0 in all cases, named in the flags or not
    args = parse_flags(flags, meta["model"], num_classes=meta["num_classes"])
    model, criterion, postprocessor = build_model(args)
    load_weights(model, case.checkpoint(meta))
    _check_names(model, meta)
    pixels, padding = case.batch(meta)
    images = ImageBatch(pixels, padding, [tuple(s) for s in meta["inputs"]["image_sizes_hw"]])
    targets = [
        make_target(*(arrays[f"targets.{i}.{key}"] for key in ("labels", "boxes", "orig_size")), image_id=i)
        for i in range(len(meta["targets"]["counts"]))
    ]
    unread = {key for key in arrays if not key.startswith("targets.")}
    for mode in meta["modes"]:
        prefix = f"{mode}/" if len(meta["modes"]) > 1 or f"{mode}/out.pred_logits" in arrays else ""
        model.train(mode == "train")
        unread -= _Mode(meta, arrays, mode, prefix).check(model, criterion, postprocessor, images, targets)
    assert not unread, f"stored, but not compared: {sorted(unread)}"


def _check_names(model: Detector, meta: dict) -> None:
    """The state dict holds exactly the names of the published file, in its order."""
    ours = [n for n in model.state_dict() if not n.endswith("relative_position_index")]
    published = [n for n, *_ in meta["checkpoint"] if not n.endswith("relative_position_index")]
    assert ours == published, f"other names: {sorted(set(ours) ^ set(published))[:5]}, or another order"


class _Mode:
    """Comparison in one mode; `seen` collects the stored arrays that were compared."""

    def __init__(self, meta: dict, arrays: dict[str, np.ndarray], mode: str, prefix: str) -> None:
        self.meta, self.arrays, self.mode, self.prefix = meta, arrays, meta["modes"][mode], prefix
        self.subset = meta["query_subset"]
        self.seen: set[str] = set()

    def stored(self, key: str) -> np.ndarray:
        self.seen.add(self.prefix + key)
        return self.arrays[self.prefix + key]

    def has(self, key: str) -> bool:
        return self.prefix + key in self.arrays

    def close(self, key: str, ours: Tensor, tolerance_key: str | None = None) -> None:
        tolerances = self.meta["tolerances"]["absolute"]
        tolerance = tolerances[self.prefix + (tolerance_key or key)]
        assert_close(self.prefix + key, ours, self.stored(key), tolerance)

    def check(
        self,
        model: Detector,
        criterion: Criterion,
        postprocessor: PostProcessor,
        images: ImageBatch,
        targets: list[Target],
    ) -> set[str]:
        with _watch(model) as seen, self.pinned_order():
            output = model(images, targets)
        self.check_features(seen, images)
        self.check_encoder(output, seen)
        self.check_decoder(output, seen)
        self.check_losses(model, criterion, output, images, targets)
        self.check_detections(postprocessor, output, targets)
        return self.seen

    @contextmanager
    def pinned_order(self):
        """Pin the order of the proposals to the stored one; our own scores must give it up to rounding."""
        if not self.has("enc.topk_indices"):
            yield
            return
        indices = torch.from_numpy(self.stored("enc.topk_indices")).long()
        tolerance = self.meta["tolerances"]["absolute"][self.prefix + "enc.topk_values"]
        original = proposals.select_top

        def pinned(scores: Tensor, count: int) -> Tensor:
            best = original(scores, count)
            assert best.shape == indices.shape, f"{best.shape[1]} proposals selected, stored {indices.shape[1]}"
            ours, stored = scores.gather(1, best), scores.gather(1, indices)
            assert (ours - stored).abs().max() <= tolerance, "other proposals are selected than stored"
            assert_close("enc.topk_values", ours, self.stored("enc.topk_values"), tolerance)
            return indices

        proposals.select_top = pinned
        try:
            yield
        finally:
            proposals.select_top = original

    def check_features(self, seen: dict, images: ImageBatch) -> None:
        for i, feature in enumerate(seen["features"]):
            self.check_map(f"probe.feature{i}", feature, f"probe.feature{i}")
        for i, feature in enumerate(seen["positions"]):
            if self.has(f"probe.pos{i}.values"):
                self.close(f"probe.pos{i}.values", case.probe(feature, 32), f"probe.pos{i}")
        for i, feature in enumerate(seen["input_proj"]):
            self.check_map(f"probe.input_proj.{i}", feature, "probe.input_proj")

    def check_map(self, key: str, feature: Tensor, tolerance_key: str) -> None:
        stats = torch.stack([feature.mean(), feature.std(), feature.abs().max()])
        self.close(f"{key}.stats", stats, tolerance_key)
        self.close(f"{key}.values", case.probe(feature), tolerance_key)

    def check_encoder(self, output: DetectorOutput, seen: dict) -> None:
        for i, tokens in enumerate(seen["encoder"]):
            if self.has(f"probe.encoder{i}"):
                self.close(f"probe.encoder{i}", _some(tokens, 24)[..., :16])
        if "encoder" not in output.sets:
            return
        encoder = output.sets["encoder"].predictions
        self.close("enc.class0", encoder.logits[0, ..., 0])
        self.close("enc.pred_logits", _some(encoder.logits[0], 40))
        self.close("enc.pred_boxes", _some(encoder.boxes[0], 40))
        self.close("probe.enc_output_memory", _some(seen["enc_output"][0], 40)[..., :16])

    def check_decoder(self, output: DetectorOutput, seen: dict) -> None:
        for i, hidden in enumerate(seen["decoder"]):
            if self.has(f"probe.decoder{i}"):
                self.close(f"probe.decoder{i}", _some(hidden, 24)[..., :16])
        group: QueryGroup = seen["groups"][0]
        self.close("out.init_reference", group.reference[:, self.subset])
        predictions = output.sets["one2one"].predictions
        references = predictions.boxes if self.meta["flags"].get("with_box_refine") else None
        if references is None:
            references = group.reference.expand(predictions.layers, -1, -1, -1)
        self.close("out.inter_references", references[:, :, self.subset])
        last = predictions.layers - 1
        self.close("out.pred_logits", predictions.logits[last])
        self.close("out.pred_boxes", predictions.boxes[last])
        for i in range(last):
            if self.has(f"out.aux{i}.pred_logits"):
                self.close(f"out.aux{i}.pred_logits", predictions.logits[i][:, self.subset], "out.pred_logits")
                self.close(f"out.aux{i}.pred_boxes", predictions.boxes[i][:, self.subset], "out.pred_boxes")
        if "one2many" in output.sets:
            many = output.sets["one2many"].predictions
            step = max(1, many.logits.shape[2] // 30)
            for i in range(many.layers):
                name = "out.one2many" if i == last else f"out.one2many.aux{i}"
                if i < last and not self.has(f"{name}.pred_logits"):  # with no_aux_loss
                    continue
                boxes = many.boxes[i] if i == last else many.boxes[i][:, ::step]
                self.close(f"{name}.pred_logits", many.logits[i][:, ::step], "out.pred_logits")
                self.close(f"{name}.pred_boxes", boxes, "out.pred_boxes")

    def check_losses(
        self, model: Detector, criterion: Criterion, output: DetectorOutput, images: ImageBatch, targets: list[Target]
    ) -> None:
        with _watch_matching(criterion) as matched:
            report = criterion(output, targets)
        self.check_matching(matched, targets, criterion.assigners["queries"])
        tolerance = self.meta["tolerances"]["loss_relative"]
        assert set(report.terms) == set(self.mode["loss_keys"]), "other entries than the published log has"
        for key in self.mode["loss_keys"]:
            assert_relative(self.prefix + key, report.terms[key], self.stored(f"loss.{key}"), tolerance)
        for key, weight in report.weights.items():
            assert self.meta["loss_weights"][key] == weight, key
        assert_relative("total", report.total, self.stored("loss.total"), tolerance)
        if self.has("grad_norms"):
            self.check_gradients(model, report.total, "grad_norms")
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            bound = self.meta["tolerances"]["grad_norm_relative"]
            assert_relative("grad_total_norm", torch.stack(norms).norm(), self.stored("grad_total_norm"), bound)
        self.check_box_losses(model, criterion, images, targets)

    def check_box_losses(
        self, model: Detector, criterion: Criterion, images: ImageBatch, targets: list[Target]
    ) -> None:
        """The same with the box losses alone: their gradients drown in those of the classification."""
        weights, criterion.weights = criterion.weights, {**criterion.weights, "loss_ce": 0.0}
        try:
            with self.pinned_order():
                report = criterion(model(images, targets), targets)
        finally:
            criterion.weights = weights
        tolerance = self.meta["tolerances"]["loss_relative"]
        assert_relative("total_boxes", report.total, self.stored("loss.total_boxes"), tolerance)
        if self.has("grad_norms_boxes"):
            self.check_gradients(model, report.total, "grad_norms_boxes")

    def check_gradients(self, model: nn.Module, total: Tensor, key: str) -> None:
        model.zero_grad()
        total.backward()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tolerance = self.meta["tolerances"]["grad_norm_relative"]
        for name, want in zip(self.mode["grad_norm_names"], self.stored(key), strict=True):
            gradient = parameters[name].grad
            norm = 0.0 if gradient is None else gradient.norm()
            assert_relative(f"{self.prefix}{key} {name}", norm, want, tolerance)

    def check_matching(
        self, matched: dict[str, tuple[Request, Assignment]], targets: list[Target], matcher: HungarianMatcher
    ) -> None:
        """Compare the pairs of every set; where they differ, the costs must be equal (a tie)."""
        for name, (request, assignment) in matched.items():
            layers = int(assignment.layer.max()) + 1 if len(assignment) else 0
            for layer in range(layers):
                for image, target in enumerate(targets):
                    here = (assignment.layer == layer) & (assignment.image == image)
                    slots = assignment.slot[here] - request.slots.start
                    ours = slots.numpy(), assignment.target[here].numpy()
                    key = f"match.{_set_name(name, layer, layers)}.{image}"
                    want = self.stored(key)
                    if not case.same_matching(ours, want, len(target)):
                        costs = matcher.costs(request.predictions, request.targets)[:, layer, request.slots]
                        cost = costs[request.targets.image == image].T
                        assert_tied(f"{self.prefix}{key}", cost.detach().numpy(), ours, want)
        for key in self.arrays:  # what is left holds no pair at all
            if key.startswith(f"{self.prefix}match.") and not self.arrays[key].size:
                self.seen.add(key)

    def check_detections(self, postprocessor: PostProcessor, output: DetectorOutput, targets: list[Target]) -> None:
        if not self.has("post.0.scores"):
            return
        sizes, bounds = [t.orig_size for t in targets], self.meta["tolerances"]["detections"]
        for i, detections in enumerate(postprocessor(output, sizes, range(len(targets)))):
            want = {key: self.stored(f"post.{i}.{key}") for key in ("scores", "labels", "boxes")}
            ours = {"scores": detections.scores, "labels": detections.labels, "boxes": detections.boxes_px}
            same = case.same_detections(ours, want, bounds["score"], bounds["box"])
            assert same, f"{self.prefix}detections of image {i} differ"


def _some(tokens: Tensor, count: int) -> Tensor:
    """Return every (length // count)-th token of (B, length, ...)."""
    return tokens[:, :: max(1, tokens.shape[1] // count)]


def _set_name(name: str, layer: int, layers: int) -> str:
    if name == "encoder":
        return "enc"
    base = "last" if layer == layers - 1 else f"aux{layer}"
    return base if name == "one2one" else f"{base}_{name}"


@contextmanager
def _watch(model: Detector):
    """Collect what the parts of the detector return during one forward pass."""
    seen = defaultdict(list)
    transformer, handles = model.transformer, []

    def watch(module: nn.Module, key: str) -> None:
        handles.append(module.register_forward_hook(lambda m, inputs, output: seen[key].append(output)))

    hook = model.backbone[0].register_forward_hook(lambda m, inputs, output: seen["features"].extend(output))
    handles.append(hook)
    watch(model.backbone[1], "positions")
    for projection in model.input_proj:
        watch(projection, "input_proj")
    for layer in transformer.encoder.layers:
        watch(layer, "encoder")
    for layer in transformer.decoder.layers:
        watch(layer, "decoder")
    if hasattr(transformer, "enc_output_norm"):
        watch(transformer.enc_output_norm, "enc_output")
    handles.append(
        transformer.decoder.register_forward_pre_hook(lambda module, inputs: seen["groups"].extend(inputs[0]))
    )
    try:
        with torch.enable_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_matching(criterion: Criterion):
    """Collect what the matcher is asked and the pairs it finds, by set."""
    matched: dict[str, tuple[Request, Assignment]] = {}
    roles = dict(criterion.assigners)
    original = roles["queries"]

    def watching(requests):
        found = original(requests)
        matched.update({r.name: (r, a) for r, a in zip(requests, found)})
        return found

    criterion.assigners.update(dict.fromkeys(roles, watching))
    try:
        yield matched
    finally:
        criterion.assigners.update(roles)
