"""Faster R-CNN as an auxiliary head: both stages on given features, the second one on given proposals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.aux_heads import sampling
from models.aux_heads.base import Objects, Pyramid, Samples
from models.aux_heads.faster_rcnn import FasterRCNNHead
from models.aux_heads.roi import RoISettings, region_levels
from models.aux_heads.rpn import ProposalRule, Proposals, RPNSettings
from tests.golden.fill import draw
from tests.golden.runners.common import assert_relative
from util.structures import Detections

STRIDES = (8, 16, 32, 64, 128)
FACTOR = 12.0  # lambda_2 times the decoder layers: part of the stored losses, not of the head's
OFFICIAL = {"rpn_head.": "rpn.", "roi_head.0.bbox_head.": "roi."}


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "random_keys", _in_order)
        case = _Case(meta, arrays)
        case.check_first_stage()
        case.check_second_stage()
        case.check_detections()
    unread = set(arrays) - case.seen
    assert not unread, f"stored, but not compared: {sorted(unread)}"


def _in_order(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Stand in for `random_keys`: the first boxes are taken."""
    return torch.arange(shape[1], dtype=torch.float32, device=device).expand(shape)


class _Case:
    """The head with drawn weights, its inputs, and comparisons that note in `seen` what was compared."""

    def __init__(self, meta: dict, arrays: dict[str, np.ndarray]) -> None:
        self.meta, self.arrays = meta, arrays
        self.seen: set[str] = set()
        sizes = [tuple(s) for s in meta["images"]]
        self.pyramid = Pyramid(_features(meta), STRIDES, sizes, usable=sizes, canvas=tuple(meta["batch_shape"]))
        self.objects = _padded(meta["targets"])
        self.proposals = Proposals(*_pad([torch.tensor(p) for p in meta["proposals"]]))
        given = meta["settings"]
        self.head = FasterRCNNHead(
            num_classes=meta["num_classes"],
            strides=STRIDES,
            rpn=RPNSettings(
                samples=given["rpn_sampler_num"],
                training=ProposalRule(given["train_nms_pre"], given["train_max_per_img"]),
            ),
            roi=RoISettings(samples=given["roi_sampler_num"]),
        )
        self.head.load_state_dict(_weights(meta))

    def stored(self, key: str) -> np.ndarray:
        self.seen.add(key)
        return self.arrays[key]

    def close(self, key: str, ours: Tensor) -> None:
        """Floats: 1e-4 absolute and relative."""
        stored = self.stored(key)
        np.testing.assert_allclose(ours.detach().numpy(), stored, rtol=1e-4, atol=1e-4, err_msg=key)

    def subsampled(self, key: str, ours: Tensor, count: int) -> None:
        flat = ours.detach().flatten()
        self.close(key, flat[:: max(1, flat.numel() // count)])

    def same(self, key: str, ours: Tensor | int) -> None:
        np.testing.assert_array_equal(np.asarray(ours), self.stored(key), err_msg=key)

    def loss(self, key: str, ours: Tensor) -> None:
        stored = self.stored(key)
        assert ours.shape == stored.shape, f"{key}: shape {tuple(ours.shape)}, stored {stored.shape}"
        for i, (a, b) in enumerate(zip(ours.flatten(), stored.flatten())):
            assert_relative(f"{key}, entry {i}", FACTOR * a, b, 2e-4)

    def check_first_stage(self) -> None:
        rpn, shapes = self.head.rpn, self.pyramid.shapes
        logits, deltas = rpn.score(self.pyramid)
        counts = rpn.grid.level_counts(shapes)
        for i, ((h, w), own, own_deltas) in enumerate(zip(shapes, logits.split(counts, 1), deltas.split(counts, 1))):
            maps = own.unflatten(1, (h, w, -1)).movedim(-1, 1)
            self.subsampled(f"rpn.cls{i}_sub", maps, 1500)
            self.subsampled(f"rpn.reg{i}_sub", own_deltas.reshape(len(own), h, w, -1).movedim(-1, 1), 1500)
        picked, target = rpn.choose(self.pyramid, self.objects)
        among_usable = rpn.grid.usable(shapes, self.pyramid.usable, "cpu").cumsum(1) - 1
        losses, proposals = rpn(self.pyramid, self.objects)
        for i in range(len(self.objects.counts)):
            for name, which in (("pos", picked.positive[i]), ("neg", picked.negative[i])):
                self.same(f"rpn.{name}{i}", among_usable[i, picked.index[i, which]])
            self.same(f"rpn.pos_gt{i}", target[i, picked.positive[i]])
            self.check_proposals(i, proposals, logits[i], deltas[i])
        self.loss("loss.loss_rpn_cls", losses["loss_rpn_cls"])
        self.loss("loss.loss_rpn_bbox", losses["loss_rpn_bbox"])

    def check_proposals(self, image: int, proposals: Proposals, logits: Tensor, deltas: Tensor) -> None:
        """Boxes in order; the stored score of each belongs to an anchor that gives this box."""
        stored = torch.from_numpy(self.stored(f"rpn.proposals{image}"))
        boxes, scores = stored.split([4, 1], -1)
        assert proposals.valid[image].sum() == len(stored)
        np.testing.assert_allclose(proposals.boxes[image, : len(stored)], boxes, rtol=1e-4, atol=1e-4)
        rpn, size = self.head.rpn, torch.tensor(self.pyramid.sizes[image])
        decoded = rpn.coder.decode(rpn.grid.anchors(self.pyramid.shapes, "cpu"), deltas, clip=size)
        same_box = torch.isclose(decoded, boxes[:, None], rtol=1e-4, atol=1e-4).all(-1)
        same_score = (logits.sigmoid() - scores).abs() <= 1e-4
        assert (same_box & same_score).any(1).all(), f"rpn.proposals{image}: no anchor gives a stored box and its score"

    def check_second_stage(self) -> None:
        roi = self.head.roi
        boxes, picked, target = roi.choose(self.objects, self.proposals)
        logits, deltas, pooled = roi.classify(self.pyramid, boxes)
        output = roi(self.pyramid, self.objects, self.proposals)
        levels = region_levels(boxes, finest_scale=roi.settings.finest_scale, levels=len(roi.strides))
        for i, taken in enumerate(picked.taken):
            self.close(f"roi.boxes{i}", boxes[i, taken])
            self.same(f"roi.level{i}", levels[i, taken])
            self.same(f"roi.num_pos{i}", picked.positive[i].sum())
            self.same(f"roi.pos_gt{i}", target[i, picked.positive[i]])
        self.subsampled("roi.cls_sub", logits[picked.taken], 4000)
        self.subsampled("roi.reg_sub", deltas[picked.taken], 4000)
        self.subsampled("roi.feat_sub", pooled[picked.taken], 4000)
        self.loss("loss.roi_loss_cls", output.losses["loss_cls"])
        self.loss("loss.roi_loss_bbox", output.losses["loss_bbox"])
        self.check_samples(output.samples)

    def check_samples(self, samples: Samples) -> None:
        """What becomes decoder queries: as many for every image."""
        there = samples.positive | samples.negative
        count = self.arrays["coords"].shape[1]
        assert there[:, :count].all() and not there[:, count:].any(), f"not {count} samples: {there.sum(1).tolist()}"
        positive, target = samples.positive[:, :count], samples.target[:, :count]
        labels = self.objects.labels.gather(1, target).where(positive, torch.tensor(self.meta["num_classes"]))
        wanted = self.objects.boxes.gather(1, target[..., None].expand(-1, -1, 4)) * positive[..., None]
        self.close("coords", samples.boxes[:, :count])
        self.same("labels", labels)
        self.close("box_targets", wanted)
        self.subsampled("feats_sub", samples.features[:, :count], 8000)

    def check_detections(self) -> None:
        found: list[Detections] = self.head.roi.predict(self.pyramid, self.proposals)
        for i, ours in enumerate(found):
            count = len(self.arrays[f"det{i}_labels"])
            self.close(f"det{i}_boxes", torch.cat([ours.boxes_px, ours.scores[:, None]], 1)[:count])
            self.same(f"det{i}_labels", ours.labels[:count])


def _features(meta: dict) -> list[Tensor]:
    shape = (len(meta["images"]), 256)
    draws = [
        np.random.RandomState(meta["feat_seed"] + i).randn(*shape, h, w) for i, (h, w) in enumerate(meta["levels"])
    ]
    return [torch.from_numpy(d.astype(np.float32)) for d in draws]


def _weights(meta: dict) -> dict[str, Tensor]:
    state = {}
    for name, shape in meta["weights"]["tensors"]:
        prefix = next(p for p in OFFICIAL if name.startswith(p))
        ours = OFFICIAL[prefix] + name.removeprefix(prefix)
        state[ours] = torch.from_numpy(draw(name, tuple(shape), meta["weights"]["seed"]))
    return state


def _pad(boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return boxes (B, R, 4) and where there are any, (B, R) bool."""
    counts = torch.tensor([len(b) for b in boxes])
    return torch.nn.utils.rnn.pad_sequence(boxes, True), torch.arange(counts.max()) < counts[:, None]


def _padded(targets: list[dict]) -> Objects:
    boxes, valid = _pad([torch.tensor(t["boxes"]) for t in targets])
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(t["labels"]) for t in targets], True)
    return Objects(labels, boxes, valid, [len(t["labels"]) for t in targets])
