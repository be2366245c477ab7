"""A detector with all that inference puts around it, from pixels to detections, as one function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.detector import Detector
from util.boxes import cxcywh_to_xyxy
from util.pixels import IMAGENET_MEAN, IMAGENET_STD
from util.structures import ImageBatch


class ExportedDetector(nn.Module):
    """What is written into an exported graph: padding mask, normalisation, detector, sigmoid and the best pairs.

    Args:
        detector: in evaluation mode.
        topk: detections of an image; fewer if it has fewer pairs of query and class.
        clip: cut boxes at the border of the image (Co-DETR).
        group: name of the set whose predictions count.
    """

    def __init__(self, detector: Detector, *, topk: int, clip: bool = False, group: str = "one2one") -> None:
        super().__init__()
        self.detector, self.topk, self.clip, self.group = detector, topk, clip, group
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: (B, 3, H, W) uint8, RGB, each in the top-left corner of the canvas; what lies beside is not read.
            sizes: (B, 2) int64, height and width of each image in the canvas, pixels.

        Returns:
            Best first: boxes (B, K, 4) float32 xyxy in pixels of the images as they were given (divide by `sizes`
            and multiply by the size of the file to get those of the file), scores (B, K) float32 and labels (B, K)
            int64, class indices of the model.
        """
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device)[:, None] >= sizes[:, 0, None, None]
        columns = torch.arange(width, device=images.device) >= sizes[:, 1, None, None]
        padding = rows | columns
        pixels = ((images.float() / 255 - self.mean) / self.std).masked_fill(padding[:, None], 0.0)
        found = self.detector(ImageBatch(pixels, padding, [])).sets[self.group].predictions
        logits, boxes = found.logits[-1], cxcywh_to_xyxy(found.boxes[-1])
        queries, classes = logits.shape[1:]
        scores, index = logits.sigmoid().flatten(1).topk(min(self.topk, queries * classes), dim=1)
        query = torch.div(index, classes, rounding_mode="floor")
        scale = sizes.flip(1).repeat(1, 2)[:, None].float()  # w, h, w, h
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4)) * scale
        if self.clip:
            boxes = torch.minimum(boxes.clamp(min=0), scale)
        return boxes, scores, index - query * classes
