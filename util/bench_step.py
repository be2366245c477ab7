"""Time of a training step without the hybrid branch, with it, and with it in the first published form.

python -m util.bench_step                           the criterion alone, on random predictions of the paper's size
python -m util.bench_step --whole                   whole steps of H-Deformable-DETR on random images
python -m util.bench_step --whole --amp bf16 ...    any flag of main.py describes another step

H-DETR (supplement E) tells two ways to compute the losses of the one-to-many branch. *Plain*: the criterion runs
twice, first for the one-to-one queries and the encoder, then for the one-to-many queries with every target K times in
its list. *Merged*: one cost computation, one copy to the host and one loss evaluation serve both, as `Criterion` does.
Both must give the same total and the same gradients, which is checked before anything is timed (exit status 1 if not).

The three forms take turns in every repetition, on the same inputs and weights (the optimiser runs with rates of 0).
Predictions that are random, not trained, cost the solver another time, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import build_criterion, num_classes
from models.criterion import Criterion
from models.detector import ENCODER_SUPERVISION
from ops.benchmark_record import record
from util.arg_rules import BRANCH_ONLY, check_args
from util.args import get_args_parser
from util.bench_common import (
    PARTS,
    Form,
    Samples,
    add_flags,
    check_least,
    check_output,
    markdown_table,
    measure,
    medians,
    model_forms,
    random_boxes,
    random_images,
    random_targets,
    ratio,
    start,
    start_anew,
    total_loss,
    with_ratio,
)
from util.environment import environment
from util.errors import UserError
from util.rng import seed_everything
from util.structures import DetectorOutput, ImageBatch, Predictions, SupervisedSet, Supervision, Target

# The model of configs/h_detr/hybrid_r50_12ep.sh; flags of the command line win.
MODEL = (
    "--backbone_weights none --with_box_refine --two_stage --mixed_selection --look_forward_twice --dropout 0 "
    "--dim_feedforward 2048 --num_queries_one2many 1500 --k_one2many 6"
)
SAME = {"loss": 1e-5, "gradient": 1e-3}  # relative differences of merged and plain from which they differ
TOKENS = "encoder proposals of an image, without --whole (the two-stage model has 22223 at 1333x800); 0: none"

Sets = dict[str, tuple[int, Supervision]]  # width and supervision of each, side by side in a stack


def repeated(target: Target, copies: int) -> Target:
    """Return `target` with its list of objects `copies` times, one after the other."""
    return replace(target, labels=target.labels.repeat(copies), boxes=target.boxes.repeat(copies, 1))


def plain_loss(criterion: Criterion, output: DetectorOutput, targets: list[Target]) -> Tensor:
    """Return the same total from two calls on sets that stand alone (H-DETR as first published).

    The second call knows nothing of one-to-many: its targets are repeated, its queries called one-to-one, and its total
    is multiplied by lambda.
    """
    branch = output.sets["one2many"]
    (taught,) = branch.supervision
    rest = {n: SupervisedSet(s.predictions, s.supervision) for n, s in output.sets.items() if n != "one2many"}
    first = criterion(DetectorOutput(rest, output.aux_losses), targets).total
    copies = [repeated(target, taught.repeat) for target in targets]
    alone = SupervisedSet(branch.predictions, (replace(taught, repeat=1, weight=1.0),))
    return first + taught.weight * criterion(DetectorOutput({"one2one": alone}), copies).total


def criterion_forms(args: Namespace, targets: list[Target], tokens: int = 0) -> list[Form]:
    """Return the three forms of the criterion on random predictions, which stay the same in all steps.

    Besides the queries of `args`, the images of `targets` have `tokens` encoder proposals each.
    """
    device = targets[0].labels.device
    criterion = build_criterion(args).to(device)
    classes, one, many = num_classes(args), args.num_queries_one2one, args.num_queries_one2many

    def predictions(layers: int, slots: int) -> Predictions:
        logits = torch.randn(layers, len(targets), slots, classes) - 2
        boxes = random_boxes(layers, len(targets), slots)
        return Predictions(logits.to(device).requires_grad_(), boxes.to(device).requires_grad_())

    alone: Sets = {"one2one": (one, Supervision())}
    hybrid = {**alone, "one2many": (many, Supervision(repeat=args.k_one2many, weight=args.lambda_one2many))}
    both, encoder = predictions(args.dec_layers, one + many), predictions(1, tokens) if tokens else None
    first = Predictions(*(x[:, :, :one].detach().clone().requires_grad_() for x in (both.logits, both.boxes)))
    forms = []
    for name, stack, sets, loss in (
        ("T = 0", first, alone, total_loss),
        ("merged", both, hybrid, total_loss),
        ("plain", both, hybrid, plain_loss),
    ):
        leaves = [x for p in (stack, encoder) if p is not None for x in (p.logits, p.boxes)]
        total = partial(lambda loss, output: loss(criterion, output, targets), loss)
        forms.append(Form(name, partial(_cut, stack, sets, encoder), total, leaves))
    return forms


def _cut(stack: Predictions, widths: Sets, encoder: Predictions | None) -> DetectorOutput:
    """Return the sets as the decoder cuts them out of its stack."""
    sets, start = {}, 0
    for name, (width, supervision) in widths.items():
        slots = slice(start, start + width)
        own = Predictions(stack.logits[:, :, slots], stack.boxes[:, :, slots])
        sets[name] = SupervisedSet(own, (supervision,), stack, start)
        start = slots.stop
    if encoder is not None:
        sets["encoder"] = SupervisedSet(encoder, ENCODER_SUPERVISION)
    return DetectorOutput(sets)


def whole_forms(args: Namespace, images: ImageBatch, targets: list[Target]) -> list[Form]:
    """Return the three forms of a whole step on B images and their objects; merged and plain share one model."""
    without = Namespace(**{**vars(args), "num_queries_one2many": 0})
    return [
        *model_forms(without, images, targets, {"T = 0": total_loss}),
        *model_forms(args, images, targets, {"merged": total_loss, "plain": plain_loss}),
    ]


def compare(merged: Form, plain: Form) -> dict[str, Any]:
    """Run both forms once, with the same dropout; return totals, norms of gradients, differences and if all is same."""
    losses, gradients = [], []
    for form in (merged, plain):
        start_anew(form)
        loss = form.loss(form.forward())
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([(torch.zeros_like(x) if x.grad is None else x.grad).ravel() for x in form.leaves]))
    norms = [gradient.norm().item() for gradient in gradients]
    found = {
        "total loss": losses,
        "gradient norm": norms,
        "loss difference": abs(losses[0] - losses[1]) / max(abs(losses[1]), 1e-12),
        "gradient difference": (gradients[0] - gradients[1]).norm().item() / max(norms[1], 1e-12),
    }
    # NaN agrees with nothing.
    return found | {"same": all(found[f"{name} difference"] < allowed for name, allowed in SAME.items())}


def _verdict(found: dict[str, Any]) -> str:
    relative = [f"{name} {found[f'{name} difference']:.1e} (allowed {allowed:.0e})" for name, allowed in SAME.items()]
    return (
        f"merged and plain {'agree' if found['same'] else 'DIFFER'}: total loss {found['total loss']}, gradient norm "
        f"{found['gradient norm']}; relative differences: {', '.join(relative)}"
    )


def table(samples: Samples, parts: Sequence[str]) -> str:
    """Return a markdown table of medians in ms, with the ratio to T = 0 in brackets."""
    found = medians(samples, parts)
    rows = [["ms", *found, "plain / merged"]]
    for part in parts:
        values = {form: own[part] for form, own in found.items()}
        last = ratio(values["plain"], values["merged"])
        rows.append([PARTS[part], *with_ratio(values, "T = 0"), last])
    return markdown_table(rows)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that are not main.py's."""
    parser = argparse.ArgumentParser(
        "python -m util.bench_step",
        description=__doc__.split("\n\n")[0],
        epilog=f"Flags of main.py describe the step, as after: {MODEL}. On a CPU --whole is quicker with --backbone "
        "resnet18 --enc_layers 1 --dec_layers 3.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(
        parser,
        ("--objects", {"nargs": "+", "type": int}, [7, 20], "per image; one table for each number"),
        ("--image_size", {"nargs": 2, "type": int}, [320, 320], "height and width, with --whole"),
        ("--tokens", {"type": int}, 0, TOKENS),
        ("--repeats", {"type": int}, 10, "measured steps of each form; their median is shown"),
        ("--warmup", {"type": int}, 2, "steps of each form before them"),
        ("--threads", {"type": int}, 0, "threads of PyTorch on the CPU; 0: its own choice"),
        ("--output", {}, "", "JSON file for all numbers; empty: save nothing"),
    )
    parser.add_argument("--whole", action="store_true", help="whole steps; else the criterion on random predictions")
    return parser


def check(own: Namespace, args: Namespace) -> None:
    """Raise a UserError that names the flag if this cannot be measured."""
    check_args(args)
    check_least(own, {"repeats": 1, "warmup": 0, "threads": 0, "tokens": 0, "objects": 0, "image_size": 1})
    if not (args.num_queries_one2many and args.k_one2many):
        raise UserError("there is no branch to time: --num_queries_one2many and --k_one2many must be at least 1")
    joint = {**BRANCH_ONLY, "hybrid": "branch"}
    changed = [f"--{name} {getattr(args, name)}" for name, plain in joint.items() if getattr(args, name) != plain]
    if changed:
        raise UserError(f"{', '.join(changed)}: the plain form knows only the joint, shared branch; leave it out")
    if args.amp == "fp16":
        raise UserError("--amp fp16 needs a loss scale, which is not measured here: use --amp bf16")
    check_output(own.output)


def build_forms(own: Namespace, args: Namespace, objects: int, device: torch.device) -> list[Form]:
    """Return the three forms on random inputs with so many objects per image."""
    seed_everything(args.seed)
    targets = random_targets([objects] * args.batch_size, num_classes(args), device)
    if not own.whole:
        return criterion_forms(args, targets, own.tokens)
    return whole_forms(args, random_images(args.batch_size, own.image_size, device), targets)


def run(own: Namespace, args: Namespace) -> list[dict[str, Any]]:
    """Measure, print and return one entry per number of objects."""
    device = start(args, own.threads)
    print(
        f"{device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}; batch {args.batch_size}, queries "
        f"{args.num_queries_one2one} + {args.num_queries_one2many}, K {args.k_one2many}, {args.dec_layers} decoder "
        f"layers, {num_classes(args)} classes; medians of {own.repeats}, in brackets the ratio to T = 0"
    )
    parts = [part for part in PARTS if own.whole or part not in ("forward", "update")]
    entries = []
    for objects in own.objects:
        forms = build_forms(own, args, objects, device)
        found = compare(*forms[1:])
        samples = measure(forms, device, repeats=own.repeats, warmup=own.warmup)
        print(f"\n{objects} objects per image\n\n{table(samples, parts)}\n\n{_verdict(found)}", flush=True)
        entries.append({"objects": objects, **found, "ms": samples})
    return entries


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if merged and plain differ, 2 after a mistake of the user."""
    own, rest = get_parser().parse_known_args(argv)
    parser = get_args_parser()
    parser.usage = "python -m util.bench_step [flags] [flags of main.py]          --help lists the former"
    args, facts = parser.parse_args([*MODEL.split(), *rest]), record()
    try:
        check(own, args)
        entries = run(own, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if own.output:
        content = {**facts, "environment": environment(), "benchmark": vars(own), "args": vars(args)}
        content["results"] = entries
        Path(own.output).write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nall numbers are in {own.output}" if own.output else "\nnothing was saved: there is no --output")
    return 0 if all(entry["same"] for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
