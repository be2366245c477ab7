"""What to look at when one batch was not learned (`main.py --overfit_batch`)."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from util.boxes import cxcywh_to_xyxy, pairwise_iou
from util.structures import Detections, Target

SURE = 0.3  # score from which a detection counts as one
NEAR = 0.5  # IoU from which a detection lies on an object, as in AP50
SHOWN = 5
FEW_STEPS = 50  # in which no rate teaches a detector a batch
KINDS = {
    "found": "",
    "unsure": f"have a box of their class on them, but its score is below {SURE:g}: classes are learned last, give "
    "more --overfit_steps or a higher --lr",
    "other class": "were found as another class: compare --category_ids, --num_classes and the classes in the picture",
    "no box": f"have no box with IoU {NEAR:g} on them: look at the boxes in the picture",
}


def fates(target: Target, found: Detections) -> list[str]:
    """Return for each of the M objects of an image what became of it, a key of `KINDS`."""
    height, width = target.orig_size
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = cxcywh_to_xyxy(target.boxes.cpu().float()) * scale
    near = pairwise_iou(boxes, found.boxes_px.detach().cpu().float()) >= NEAR  # (M, K)
    same = target.labels.cpu()[:, None] == found.labels.cpu()[None]
    sure = (found.scores.cpu() >= SURE)[None]
    return [_fate(*flags) for flags in zip(*(_any(v) for v in (near & same & sure, near & ~same & sure, near & same)))]


def _any(values: Tensor) -> list[bool]:
    return values.any(dim=1).tolist()


def _fate(found: bool, other: bool, unsure: bool) -> str:
    return "found" if found else "other class" if other else "unsure" if unsure else "no box"


def hints(
    args: Namespace,
    losses: Sequence[float],
    ap50: Sequence[tuple[int, float]],
    targets: Sequence[Target],
    detections: Sequence[Detections],
    class_names: Sequence[str],
) -> list[str]:
    """Return sentences about what went wrong, most general first.

    Args:
        args: the command line.
        losses: of every step. ap50: (steps done, AP50) in the course of them.
        targets, detections: of the B images, after the last step.
    """
    return [*_about_course(args, losses, ap50), *_about_objects(args, targets, detections, class_names)]


def _about_course(args: Namespace, losses: Sequence[float], ap50: Sequence[tuple[int, float]]) -> list[str]:
    tail = losses[-max(len(losses) // 10, 1) :]
    share = sum(tail) / len(tail) / losses[0]
    lines = []
    if args.lr == 0:
        lines.append("--lr 0: nothing is trained")
    elif not share < 1:
        lines.append(
            f"the loss did not fall ({losses[0]:.3f} at first, {tail[-1]:.3f} at last): --lr {args.lr:g} is too high, "
            "try a tenth of it"
        )
    elif share > 0.9:
        few = f"{len(losses)} steps are too few (--overfit_steps), " if len(losses) < FEW_STEPS else ""
        lines.append(
            f"the loss hardly fell ({100 * share:.0f}% of its start): {few}--lr {args.lr:g} is too low, or too "
            "much is kept from learning (--freeze, --lr_backbone)"
        )
    elif len(ap50) > 4 and ap50[-1][1] > ap50[-4][1] + 0.02:
        lines.append(f"AP50 was still rising: give more --overfit_steps than {len(losses)}")
    return lines


def _about_objects(
    args: Namespace, targets: Sequence[Target], detections: Sequence[Detections], class_names: Sequence[str]
) -> list[str]:
    crowded = [t.image_id for t in targets if len(t) > args.num_queries_one2one]
    lines = []
    if crowded:
        lines.append(f"image ids {crowded} have more objects than --num_queries_one2one {args.num_queries_one2one}")
    found = [
        (t, label, fate) for t, d in zip(targets, detections) for label, fate in zip(t.labels.tolist(), fates(t, d))
    ]
    for kind, text in KINDS.items():
        missed = [(class_names[label], t.image_id) for t, label, fate in found if fate == kind]
        if missed and text:
            classes = Counter(name for name, _ in missed).most_common(SHOWN)
            images = Counter(image_id for _, image_id in missed).most_common(SHOWN)
            lines.append(
                f"{len(missed)} of {len(found)} objects {text} (classes: "
                f"{', '.join(f'{name} {n}' for name, n in classes)}; images: "
                f"{', '.join(f'{image_id} {n}' for image_id, n in images)})"
            )
    surplus = sum(int((d.scores >= SURE).sum()) for d in detections) - len(found)
    if surplus > 0:
        lines.append(f"{surplus} more detections with a score of {SURE:g} than objects: they lower AP50")
    return lines
