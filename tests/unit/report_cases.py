"""An output folder as a short training leaves it, made without training."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import build_dataset
from datasets.evaluators import CocoEvaluator
from tests.cli import flags
from util.args import get_args_parser
from util.eval_curves import eval_curves, write_eval_curves

DATA = "--synthetic_val 6 --synthetic_classes 3 --synthetic_objects 2 4"


def make_run(folder: Path, more: str = "") -> Path:
    """Write log, settings and an evaluation of six images of three classes; return the folder.

    Of every image the first object is missed, the others are found, and every third detection has the next class.
    """
    args = get_args_parser().parse_args(flags("exps/run", f"{DATA} {more}"))
    dataset = build_dataset("val", args)
    evaluator = CocoEvaluator(dataset)
    results, last = [], None
    for i, entry in enumerate(dataset.coco.dataset["annotations"]):
        if entry["image_id"] != last:
            last = entry["image_id"]
            continue
        category = dataset.category_ids[(dataset.category_ids.index(entry["category_id"]) + (i % 3 == 0)) % 3]
        score = 0.9 - 0.01 * i
        results.append(
            {"image_id": last, "category_id": category, "bbox": [float(x) for x in entry["bbox"]], "score": score}
        )
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    evaluator.load(folder / "eval" / "results.json")
    evaluator.save(folder / "eval")
    write_eval_curves(eval_curves(evaluator), folder / "eval")
    stats = evaluator.summarize()
    (folder / "eval" / "stats.json").write_text(json.dumps(stats))
    numbers = stats["coco_eval_bbox"]
    log = [
        {"epoch": i, "train_loss": 9.0 - i, "train_lr": 1e-4, "train_epoch_time": 100.0, "n_parameters": 12345678}
        | {"test_loss": 9.5 - i, "test_coco_eval_bbox": numbers}
        for i in range(2)
    ]
    (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (folder / "args.json").write_text(json.dumps(vars(args)))
    (folder / "env.txt").write_text("command: old\n\ncommand: python main.py --lr 0.001 --note '<b>'\ntorch: 2.9\n\n")
    return folder
