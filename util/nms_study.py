"""The falsification test of hybrid matching (H-DETR, table 13): what does NMS change, for each group of queries?

    LAUNCH="python -m util.nms_study" configs/synthetic/crowded_branch.sh --resume CHECKPOINT --output_dir FOLDER

takes the flags of `main.py`, so any preset can be studied. One-to-one queries must not need NMS (its AP changes by less
than 0.005), one-to-many queries must need it (it raises their AP by at least 0.15); otherwise the exit code is 1.
Writes `nms.md`, `nms.json` and `nms.png` into the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from datasets import build_dataset, build_eval_loader
from datasets.evaluators import CocoEvaluator
from models import build_detector
from models.postprocess import PostProcessor
from util.arg_rules import check_args
from util.args import get_args_parser
from util.checkpoint import load_weights, read_checkpoint
from util.engine import StepSettings, evaluate
from util.errors import UserError

NMS_IOU = 0.7
ONE2ONE_BOUND, ONE2MANY_BOUND = 0.005, 0.15  # AP in [0, 1]


@dataclass(frozen=True)
class Row:
    """One evaluation; AP in [0, 1]."""

    group: str
    nms_iou: float  # 0 = no NMS
    ap: float
    ap50: float
    ap75: float


def study(
    model: nn.Module, loader: DataLoader, *, settings: StepSettings, device: torch.device, nms_iou: float, topk: int
) -> list[Row]:
    """Evaluate every group of `model` on the images of `loader`, without and with NMS."""
    for source in model.groups.values():
        source.training_only = False
    rows, evaluator = [], CocoEvaluator(loader.dataset, topk=topk)
    for group in model.groups:
        for threshold in (0.0, nms_iou):
            evaluator.reset()
            postprocessor = PostProcessor(topk, nms_iou=threshold, group=group)
            stats, _ = evaluate(model, None, postprocessor, loader, evaluator, settings, device)
            rows.append(Row(group, threshold, *stats["coco_eval_bbox"][:3]))
    return rows


def verdicts(rows: Sequence[Row]) -> list[tuple[bool, str]]:
    """Return for each group whether the paper's claim holds, and the sentence that says so."""
    found = []
    for group in dict.fromkeys(row.group for row in rows):
        without, with_nms = (row.ap for row in rows if row.group == group)
        gain = with_nms - without
        if group == "one2one":
            holds, claim = abs(gain) < ONE2ONE_BOUND, f"less than {ONE2ONE_BOUND} either way"
        else:
            holds, claim = gain >= ONE2MANY_BOUND, f"at least +{ONE2MANY_BOUND}"
        found.append(
            (holds, f"{group}: NMS changes AP by {gain:+.4f} (claim: {claim}): {'holds' if holds else 'FAILS'}")
        )
    return found


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a markdown table, AP in percent."""
    lines = ["| queries | NMS | AP | AP50 | AP75 |", "|---|---|---|---|---|"]
    for row in rows:
        nms = f"IoU {row.nms_iou:g}" if row.nms_iou else "no"
        numbers = " | ".join(f"{100 * n:.1f}" for n in (row.ap, row.ap50, row.ap75))
        lines.append(f"| {row.group} | {nms} | {numbers} |")
    return "\n".join(lines)


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write table, numbers and, with matplotlib, a picture; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nms.md").write_text(table(rows) + "\n")
    (folder / "nms.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    written = [folder / "nms.md", folder / "nms.json"]
    try:
        import matplotlib
    except ImportError:
        return written
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(row.group for row in rows))
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for shift, label in ((-0.2, "no NMS"), (0.2, "NMS")):
        heights = [100 * r.ap for r in rows if (r.nms_iou > 0) == (label == "NMS")]
        bars = axes.bar([i + shift for i in range(len(groups))], heights, 0.4, label=label)
        axes.bar_label(bars, fmt="%.1f")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("AP")
    axes.set_ylim(0, 105)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(folder / "nms.png", dpi=120)
    plt.close(figure)
    return [*written, folder / "nms.png"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if the claims hold, 1 if not, 2 after a mistake of the user."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith("main.py"):  # a preset puts the script it starts in front of its flags
        del words[0]
    parser = get_args_parser()
    args = parser.parse_args(words)
    try:
        rows, folder = run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = verdicts(rows)
    print(table(rows), *(line for _, line in found), sep="\n")
    print(f"outputs are in {folder}: {', '.join(path.name for path in write(rows, folder))}")
    return 0 if all(holds for holds, _ in found) else 1


def run(args: argparse.Namespace) -> tuple[list[Row], Path]:
    """Return the rows of the study that the flags describe, and the folder for its files.

    Raises:
        UserError: a flag is missing or wrong, or there is only one group of queries.
    """
    check_args(args)
    if not args.resume or args.resume == "auto" or not args.output_dir:
        raise UserError("give the weights with --resume CHECKPOINT and a folder for the results with --output_dir")
    dataset = build_dataset("val", args)
    args.num_classes = args.num_classes or dataset.num_classes
    args.backbone_weights = "none" if args.backbone_weights == "none" else "checkpoint"  # no download
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    model = build_detector(args)
    if len(model.groups) < 2:
        raise UserError("these flags make only the queries of inference: give those of the hybrid branch")
    for line in load_weights(model, read_checkpoint(args.resume), name=args.resume).lines:
        print(f"{args.resume}: {line}")
    loader = build_eval_loader(dataset, batch_size=args.eval_batch_size, num_workers=args.num_workers)
    settings = StepSettings(args.amp, print_freq=args.print_freq)
    nms_iou = args.nms_iou or NMS_IOU
    rows = study(model.to(device), loader, settings=settings, device=device, nms_iou=nms_iou, topk=args.topk)
    return rows, Path(args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
