"""Detections of Co-DETR: plain, with soft-NMS, with NMS; boxes are clipped to the image in all three."""

from __future__ import annotations

import numpy as np
import torch

from models.postprocess import PostProcessor
from tests.golden.case import same_detections

SETTINGS = {"plain": {}, "soft": {"soft_nms_iou": 0.8}, "hard": {"nms_iou": 0.7}}


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    assert meta["variants"].keys() == SETTINGS.keys()
    logits, boxes = torch.from_numpy(arrays["logits"]), torch.from_numpy(arrays["boxes"])
    sizes = [(h / scale, w / scale) for (h, w), scale in zip(meta["images"], meta["scale_factor"])]
    for name, settings in SETTINGS.items():
        found = PostProcessor(meta["max_per_img"], clip=True, **settings).select(
            logits, boxes, sizes, range(len(sizes))
        )
        for image, detections in enumerate(found):
            stored = arrays[f"{name}.boxes{image}"]
            want = {"scores": stored[:, 4], "labels": arrays[f"{name}.labels{image}"], "boxes": stored[:, :4]}
            ours = {"scores": detections.scores, "labels": detections.labels, "boxes": detections.boxes_px}
            assert same_detections(ours, want, 1e-5, 1e-3), f"{name}: detections of image {image} differ"
