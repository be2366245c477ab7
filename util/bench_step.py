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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import ops
from models import build_criterion, build_detector, num_classes
from models.assign import HungarianMatcher, hungarian
from models.criterion import Criterion
from models.detector import ENCODER_SUPERVISION
from util import dist
from util.arg_rules import BRANCH_ONLY, check_args
from util.args import get_args_parser
from util.engine import StepSettings
from util.environment import environment
from util.errors import UserError
from util.optim import build_optimizer, freeze
from util.rng import seed_everything
from util.structures import DetectorOutput, ImageBatch, Predictions, SupervisedSet, Supervision, Target

# The model of configs/h_detr/hybrid_r50_12ep.sh; flags of the command line win.
MODEL = (
    "--backbone_weights none --with_box_refine --two_stage --mixed_selection --look_forward_twice --dropout 0 "
    "--dim_feedforward 2048 --num_queries_one2many 1500 --k_one2many 6"
)
PARTS = {
    "forward": "forward",
    "criterion": "criterion",
    "matching": "- of it matching",
    "solver": "- - of it the solver, on the host",
    "backward": "backward",
    "update": "gradient norm and optimiser",
    "step": "all of it",
}
SAME = {"loss": 1e-5, "gradient": 1e-3}  # relative differences of merged and plain from which they differ
TOKENS = "encoder proposals of an image, without --whole (the two-stage model has 22223 at 1333x800); 0: none"

Loss = Callable[[Criterion, DetectorOutput, list[Target]], Tensor]
Sets = dict[str, tuple[int, Supervision]]  # width and supervision of each, side by side in a stack
Samples = dict[str, dict[str, list[float]]]  # milliseconds by form and part, one per repetition


@dataclass
class Form:
    """One way to make a step; those of one model share its weights."""

    name: str  # "T = 0", "merged", "plain"
    forward: Callable[[], DetectorOutput]
    loss: Callable[[DetectorOutput], Tensor]  # scalar to back-propagate
    leaves: list[Tensor]  # what gets gradients
    update: Callable[[], None] | None = None  # None: the leaves are predictions, there is nothing to step


def repeated(target: Target, copies: int) -> Target:
    """Return `target` with its list of objects `copies` times, one after the other."""
    return replace(target, labels=target.labels.repeat(copies), boxes=target.boxes.repeat(copies, 1))


def merged_loss(criterion: Criterion, output: DetectorOutput, targets: list[Target]) -> Tensor:
    """Return the total of one call for all sets; sets that were decoded together share costs and losses."""
    return criterion(output, targets).total


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


def random_targets(counts: Sequence[int], classes: int, device: torch.device | str = "cpu") -> list[Target]:
    """Return one target per entry of `counts` with so many random objects."""
    return [
        Target(torch.randint(classes, (count,)), _random_boxes(count), image_id=i, orig_size=(1, 1)).to(device)
        for i, count in enumerate(counts)
    ]


def _random_boxes(*shape: int) -> Tensor:
    """Return boxes (*shape, 4): centres anywhere, sides of 0.05 to 0.45."""
    return torch.cat([torch.rand(*shape, 2), 0.05 + 0.4 * torch.rand(*shape, 2)], -1)


def criterion_forms(args: Namespace, targets: list[Target], tokens: int = 0) -> list[Form]:
    """Return the three forms of the criterion on random predictions, which stay the same in all steps.

    Besides the queries of `args`, the images of `targets` have `tokens` encoder proposals each.
    """
    device = targets[0].labels.device
    criterion = build_criterion(args).to(device)
    classes, one, many = num_classes(args), args.num_queries_one2one, args.num_queries_one2many

    def predictions(layers: int, slots: int) -> Predictions:
        logits = torch.randn(layers, len(targets), slots, classes) - 2
        boxes = _random_boxes(layers, len(targets), slots)
        return Predictions(logits.to(device).requires_grad_(), boxes.to(device).requires_grad_())

    alone: Sets = {"one2one": (one, Supervision())}
    hybrid = {**alone, "one2many": (many, Supervision(repeat=args.k_one2many, weight=args.lambda_one2many))}
    both, encoder = predictions(args.dec_layers, one + many), predictions(1, tokens) if tokens else None
    first = Predictions(*(x[:, :, :one].detach().clone().requires_grad_() for x in (both.logits, both.boxes)))
    forms = []
    for name, stack, sets, loss in (
        ("T = 0", first, alone, merged_loss),
        ("merged", both, hybrid, merged_loss),
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
        *_whole_forms(without, images, targets, {"T = 0": merged_loss}),
        *_whole_forms(args, images, targets, {"merged": merged_loss, "plain": plain_loss}),
    ]


def _whole_forms(args: Namespace, images: ImageBatch, targets: list[Target], losses: dict[str, Loss]) -> list[Form]:
    """Return steps of one model, as `util.engine.train_one_epoch` makes them."""
    seed_everything(args.seed)
    device = images.pixels.device
    model, criterion = build_detector(args).to(device), build_criterion(args).to(device)
    freeze(model, args.freeze)
    optimizer = build_optimizer(args, model, criterion, lr_factor=0.0)  # as much work, and the weights stay
    settings = StepSettings(args.amp, clip_max_norm=args.clip_max_norm)
    leaves = [p for group in optimizer.param_groups for p in group["params"]]

    def forward() -> DetectorOutput:
        with settings.autocast(device):
            return model(images, targets)

    def total(loss: Loss, output: DetectorOutput) -> Tensor:
        with settings.autocast(device):
            return loss(criterion, output, targets)

    def update() -> None:
        nn.utils.clip_grad_norm_(leaves, settings.clip_max_norm or float("inf"))
        optimizer.step()

    return [Form(name, forward, partial(total, loss), leaves, update) for name, loss in losses.items()]


def compare(merged: Form, plain: Form) -> dict[str, Any]:
    """Run both forms once, with the same dropout; return totals, norms of gradients, differences and if all is same."""
    losses, gradients = [], []
    for form in (merged, plain):
        _start_anew(form)
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


def _start_anew(form: Form) -> None:
    torch.manual_seed(0)
    for leaf in form.leaves:
        leaf.grad = None


def timed_step(form: Form, device: torch.device, *, parts: bool) -> dict[str, float]:
    """Make one step and return its milliseconds by part; without `parts` only `step`, with no wait inside.

    Matching ends with a copy to the host, so its time needs no wait.
    """
    ms: dict[str, float] = defaultdict(float)
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)

    @contextmanager
    def part(name: str, wait: bool = False) -> Iterator[None]:
        start = perf_counter()
        yield
        if wait:
            synchronize()
        ms[name] += 1000 * (perf_counter() - start)

    _start_anew(form)
    synchronize()
    with (
        patch.object(HungarianMatcher, "__call__", part("matching")(HungarianMatcher.__call__)),
        patch.object(hungarian, "linear_sum_assignment", part("solver")(hungarian.linear_sum_assignment)),
        part("step", wait=True),
    ):
        with part("forward", wait=parts):
            output = form.forward()
        with part("criterion", wait=parts):
            total = form.loss(output)
        with part("backward", wait=parts):
            total.backward()
        if form.update is not None:
            with part("update", wait=parts):
                form.update()
    return dict(ms) if parts else {"step": ms["step"]}


def measure(forms: Sequence[Form], device: torch.device, *, repeats: int, warmup: int) -> Samples:
    """Return the milliseconds of every repetition by form and part; the forms take turns.

    On a GPU the whole step has a run of its own: waiting between the parts would add to it.
    """
    samples: Samples = {form.name: defaultdict(list) for form in forms}
    for repetition in range(-warmup, repeats):
        for form in forms:
            ms = timed_step(form, device, parts=True)
            if device.type != "cpu":
                ms |= timed_step(form, device, parts=False)
            for part, value in ms.items() if repetition >= 0 else ():
                samples[form.name][part].append(value)
    return samples


def table(samples: Samples, parts: Sequence[str]) -> str:
    """Return a markdown table of medians in ms, with the ratio to T = 0 in brackets."""
    medians = {form: {part: median(own.get(part, [0.0])) for part in parts} for form, own in samples.items()}
    lines = [f"| ms | {' | '.join(medians)} | plain / merged |", "|---" * (len(medians) + 2) + "|"]
    for part in parts:
        cells = [f"{own[part]:.2f} ({_ratio(own[part], medians['T = 0'][part])})" for own in medians.values()]
        last = _ratio(medians["plain"][part], medians["merged"][part])
        lines.append(f"| {PARTS[part]} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines)


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else "-"


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
    for name, kind, default, text in (
        ("--objects", {"nargs": "+", "type": int}, [7, 20], "per image; one table for each number"),
        ("--image_size", {"nargs": 2, "type": int}, [320, 320], "height and width, with --whole"),
        ("--tokens", {"type": int}, 0, TOKENS),
        ("--repeats", {"type": int}, 10, "measured steps of each form; their median is shown"),
        ("--warmup", {"type": int}, 2, "steps of each form before them"),
        ("--threads", {"type": int}, 0, "threads of PyTorch on the CPU; 0: its own choice"),
        ("--output", {}, "", "JSON file for all numbers; empty: save nothing"),
    ):
        parser.add_argument(name, default=default, help=text, **kind)
    parser.add_argument("--whole", action="store_true", help="whole steps; else the criterion on random predictions")
    return parser


def check(own: Namespace, args: Namespace) -> None:
    """Raise a UserError that names the flag if this cannot be measured."""
    check_args(args)
    for name, least in {"repeats": 1, "warmup": 0, "threads": 0, "tokens": 0, "objects": 0, "image_size": 1}.items():
        value = getattr(own, name)
        if min(value if isinstance(value, list) else [value]) < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if not (args.num_queries_one2many and args.k_one2many):
        raise UserError("there is no branch to time: --num_queries_one2many and --k_one2many must be at least 1")
    joint = {**BRANCH_ONLY, "hybrid": "branch"}
    changed = [f"--{name} {getattr(args, name)}" for name, plain in joint.items() if getattr(args, name) != plain]
    if changed:
        raise UserError(f"{', '.join(changed)}: the plain form knows only the joint, shared branch; leave it out")
    if args.amp == "fp16":
        raise UserError("--amp fp16 needs a loss scale, which is not measured here: use --amp bf16")
    if own.output and not Path(own.output).resolve().parent.is_dir():
        raise UserError(f"--output {own.output}: there is no folder {Path(own.output).parent}; make it first")


def build_forms(own: Namespace, args: Namespace, objects: int, device: torch.device) -> list[Form]:
    """Return the three forms on random inputs with so many objects per image."""
    seed_everything(args.seed)
    batch, (height, width) = args.batch_size, own.image_size
    targets = random_targets([objects] * batch, num_classes(args), device)
    if not own.whole:
        return criterion_forms(args, targets, own.tokens)
    padding = torch.zeros(batch, height, width, dtype=torch.bool)
    images = ImageBatch(torch.randn(batch, 3, height, width), padding, [(height, width)] * batch)
    return whole_forms(args, images.to(device), targets)


def run(own: Namespace, args: Namespace) -> list[dict[str, Any]]:
    """Measure, print and return one entry per number of objects."""
    device = dist.init_distributed_mode(args.device, None, args.dist_timeout)
    if own.threads:
        torch.set_num_threads(own.threads)
    try:
        ops.set_backend(args.ops_backend)
    except ValueError as error:
        raise UserError(f"--ops_backend {args.ops_backend}: {error}") from error
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
    args = parser.parse_args([*MODEL.split(), *rest])
    try:
        check(own, args)
        entries = run(own, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if own.output:
        content = {"environment": environment(), "benchmark": vars(own), "args": vars(args), "results": entries}
        Path(own.output).write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nall numbers are in {own.output}" if own.output else "\nnothing was saved: there is no --output")
    return 0 if all(entry["same"] for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
