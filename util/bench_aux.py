"""Time and memory of a training step with 0, 1 and 2 auxiliary heads (Co-DETR, section 3), and what of it takes them.

python -m util.bench_aux --output_dir FOLDER        K = 0, 1 (atss) and 2 (atss faster_rcnn)
python -m util.bench_aux --aux_heads atss atss gfl  one more column with these heads; may be given several times
python -m util.bench_aux --amp bf16 ...             any other flag of main.py describes another model or step

All columns take turns in every repetition, on the same random images and objects; the numbers are medians, in brackets
the ratio to K = 0. One more column, both heads without decoder queries of their own (`--lambda1 0`), splits the cost of
K = 2 into that of the heads with their assigners and that of making, decoding and teaching their queries: forward,
backward and optimiser of each are in it, which a clock inside the step would not tell. The losses of the heads are part
of the detector's forward pass, those of their queries part of the criterion.

The model is the R50 of the paper. On a CPU the images are small: what does not shrink with them, the 512 regions of
faster_rcnn and the queries, weighs more there than at the size of the paper, which is the default on a GPU.

Memory is on a GPU the peak of what PyTorch allocates for the model, its optimiser and one step. On a CPU, where nobody
counts, it is what the backward pass finds: the tensors that the forward pass keeps for it, every storage once, and the
trained parameters with their gradients; not the optimiser's two averages of each, nor what lives only for a moment.

A step waits for the device
- with any head once in `models.groups.positives.choose_all`: one `tolist` tells how many queries all heads make;
- with faster_rcnn once more in its RPN: NMS decides how many proposals there are. At most 2^16 candidates enter a call,
  which is four images with 16000 of them each; larger batches make more calls;
- with or without heads once in the Hungarian matching where its solver cannot be compiled for the GPU: all costs are
  copied to the host together.
A training run waits further for what it logs; and, without fused AdamW on a GPU, to see that loss and gradient are
finite.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models import num_classes
from models.aux_heads import HEADS
from ops.benchmark_record import record
from util.arg_rules import check_args
from util.args import get_args_parser
from util.bench_common import (
    PARTS,
    Form,
    Samples,
    add_flags,
    check_least,
    markdown_table,
    measure,
    medians,
    model_forms,
    random_images,
    random_targets,
    ratio,
    start,
    start_anew,
    total_loss,
    with_ratio,
)
from util.environment import environment, prepare_output_dir
from util.errors import UserError
from util.rng import seed_everything

# The two-stage model with the usual tricks that Co-Deformable-DETR starts from; flags of the command line win.
MODEL = (
    "--backbone_weights none --with_box_refine --two_stage --mixed_selection --look_forward_twice --dropout 0 "
    "--dim_feedforward 2048"
)
ON_GPU = {"image_size": [800, 1066], "repeats": 20, "warmup": 3}
ON_CPU = {"image_size": [256, 256], "repeats": 3, "warmup": 0}  # the step before that of the memory warms up
NONE, ONE, TWO, SILENT = "K = 0", "K = 1", "K = 2", "K = 2 without queries"
MIB = 2**20
MEMORY = {
    "kept": "kept for the backward pass",
    "parameters": "trained parameters",
    "gradients": "their gradients",
    "all": "all of it",
}


def variants(args: Namespace, more: Sequence[Sequence[str]] = ()) -> dict[str, Namespace]:
    """Return the arguments of every column: those of `args` with other heads.

    Args:
        more: lists of heads, a column for each.
    """
    lists: dict[str, tuple[list[str], float]] = {
        NONE: ([], args.lambda1),
        ONE: (["atss"], args.lambda1),
        TWO: (["atss", "faster_rcnn"], args.lambda1),
        SILENT: (["atss", "faster_rcnn"], 0.0),
    }
    for heads in more:
        lists[f"K = {len(heads)} ({' '.join(heads)})"] = (list(heads), args.lambda1)
    return {
        name: Namespace(**{**vars(args), "aux_heads": heads, "lambda1": weight})
        for name, (heads, weight) in lists.items()
    }


def build_forms(
    columns: dict[str, Namespace], *, size: tuple[int, int], objects: int, device: torch.device
) -> tuple[list[Form], dict[str, dict[str, int]]]:
    """Return a whole step of every column on the same random inputs, and the bytes of each by the keys of `MEMORY`.

    Args:
        size: (h, w) of the images.
        objects: in every image.
    """
    forms, memory = [], {}
    for name, args in columns.items():
        seed_everything(args.seed)
        targets = random_targets([objects] * args.batch_size, num_classes(args), device)
        images = random_images(args.batch_size, size, device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        (form,) = model_forms(args, images, targets, {name: total_loss})
        memory[name] = peak_memory(form, device, before) if device.type == "cuda" else kept_memory(form)
        forms.append(form)
    return forms, memory


def one_step(form: Form) -> None:
    """Make a step and leave the gradients."""
    start_anew(form)
    form.loss(form.forward()).backward()
    form.update()


def peak_memory(form: Form, device: torch.device, before: int) -> dict[str, int]:
    """Return the peak of one step in bytes, above the `before` bytes that were allocated without the model.

    It is the second step: the first one makes the state of the optimiser.
    """
    one_step(form)
    torch.cuda.reset_peak_memory_stats(device)
    one_step(form)
    peak = torch.cuda.max_memory_allocated(device) - before
    start_anew(form)
    return {"all": peak}


def kept_memory(form: Form) -> dict[str, int]:
    """Return in bytes what one backward pass finds: kept tensors, every storage once, parameters and gradients."""
    one_step(form)  # warms up
    start_anew(form)
    parameters = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in form.leaves}
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        # The graph holds all of it until the backward pass, so no address is given away twice.
        total = form.loss(form.forward())
    total.backward()
    gradients = sum(x.grad.untyped_storage().nbytes() for x in form.leaves if x.grad is not None)
    start_anew(form)
    parts = {"kept": sum(kept.values()), "parameters": sum(parameters.values()), "gradients": gradients}
    return {**parts, "all": sum(parts.values())}


def time_table(samples: Samples) -> str:
    """Return a markdown table of medians in ms, with the ratio to K = 0 in brackets."""
    found = medians(samples, list(PARTS))
    rows = [["ms", *found]]
    rows += [[label, *with_ratio({n: own[part] for n, own in found.items()}, NONE)] for part, label in PARTS.items()]
    return markdown_table(rows)


def memory_table(memory: dict[str, dict[str, int]]) -> str:
    """Return a markdown table of MiB, with the ratio to K = 0 in brackets."""
    rows = [["MiB", *memory]]
    for part in memory[NONE]:
        rows.append([MEMORY[part], *with_ratio({n: own[part] / MIB for n, own in memory.items()}, NONE)])
    return markdown_table(rows)


def breakdown(samples: Samples, memory: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """Return what K = 2 spends on what, in ms and MiB: differences of columns, so small ones may be noise."""
    step = {name: own["step"] for name, own in medians(samples, ["step"]).items()}
    held = {name: own["all"] / MIB for name, own in memory.items()}
    return {
        unit: {
            "detector without heads": of[NONE],
            "heads and their assigners": of[SILENT] - of[NONE],
            "queries of the heads: making, decoding, losses": of[TWO] - of[SILENT],
            "all of K = 2": of[TWO],
        }
        for unit, of in (("ms", step), ("MiB", held))
    }


def breakdown_table(found: dict[str, dict[str, float]]) -> str:
    """Return the breakdown as a markdown table, with the share of the whole in brackets."""
    rows = [["K = 2", *found]]
    for part in found["ms"]:
        rows.append([part, *(f"{own[part]:.1f} ({ratio(own[part], own['all of K = 2'])})" for own in found.values())])
    return markdown_table(rows)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that are not main.py's, and of `--aux_heads`, which here adds a column."""
    parser = argparse.ArgumentParser(
        "python -m util.bench_aux",
        description=__doc__.split("\n\n")[0],
        epilog=f"Flags of main.py describe the step, as after: {MODEL}. --output_dir FOLDER saves all numbers.",
        allow_abbrev=False,
    )
    more = {"nargs": "+", "action": "append", "choices": list(HEADS)}
    either = "default {} on a GPU, {} elsewhere"
    defaults = {name: either.format(ON_GPU[name], ON_CPU[name]) for name in ON_GPU}
    add_flags(
        parser,
        ("--aux_heads", more, [], "heads of one more column; may be given several times"),
        ("--objects", {"type": int}, 7, "per image, default 7"),
        ("--image_size", {"nargs": 2, "type": int}, None, f"height and width, {defaults['image_size']}"),
        ("--repeats", {"type": int}, None, f"measured steps of each column, {defaults['repeats']}"),
        ("--warmup", {"type": int}, None, f"steps of each column before them, {defaults['warmup']}"),
        ("--threads", {"type": int}, 0, "threads of PyTorch on the CPU; default 0: its own choice"),
    )
    return parser


def check(own: Namespace, columns: dict[str, Namespace]) -> None:
    """Raise a UserError that names the flag if this cannot be measured."""
    for args in columns.values():
        check_args(args)
    given = {"repeats": 1, "warmup": 0, "threads": 0, "objects": 0, "image_size": 1}
    check_least(own, {name: least for name, least in given.items() if getattr(own, name) is not None})
    args = columns[NONE]
    if args.lambda1 == 0:
        raise UserError("--lambda1 0: the queries of the heads are measured here; leave it out")
    if args.amp == "fp16":
        raise UserError("--amp fp16 needs a loss scale, which is not measured here: use --amp bf16")
    if args.use_checkpoint:
        raise UserError("--use_checkpoint keeps its tensors where they cannot be counted; leave it out")


def run(own: Namespace, columns: dict[str, Namespace]) -> tuple[str, dict[str, Any]]:
    """Measure; return the report as markdown, and all numbers."""
    args = columns[NONE]
    device = start(args, own.threads)
    for name, value in (ON_GPU if device.type == "cuda" else ON_CPU).items():
        if getattr(own, name) is None:
            setattr(own, name, value)
    forms, memory = build_forms(columns, size=tuple(own.image_size), objects=own.objects, device=device)
    samples = measure(forms, device, repeats=own.repeats, warmup=own.warmup)
    parts = breakdown(samples, memory)
    height, width = own.image_size
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} thread(s)"
    report = (
        f"{device}, {where}, torch {torch.__version__}, amp {args.amp}; {args.backbone}, {args.batch_size} images "
        f"{height}x{width} with {own.objects} objects each, {args.num_queries_one2one} queries, {args.enc_layers} + "
        f"{args.dec_layers} layers, {num_classes(args)} classes; medians of {own.repeats}, in brackets the ratio to "
        f"{NONE}\n\n{time_table(samples)}\n\n{_what_is_counted(device)}\n\n{memory_table(memory)}\n\nDifferences of "
        f"columns, in brackets the share of {TWO}\n\n{breakdown_table(parts)}\n"
    )
    return report, {"device": where, "ms": samples, "bytes": memory, "breakdown": parts}


def _what_is_counted(device: torch.device) -> str:
    if device.type == "cuda":
        return "Peak of what PyTorch allocates on the GPU for the model, its optimiser and one step"
    return "Tensors kept for the backward pass (every storage once), trained parameters and gradients; no optimiser"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after a mistake of the user."""
    own, rest = get_parser().parse_known_args(argv)
    parser = get_args_parser()
    parser.usage = "python -m util.bench_aux [flags] [flags of main.py]          --help lists the former"
    args = parser.parse_args([*MODEL.split(), *rest])
    columns, facts = variants(args, own.aux_heads), record()
    try:
        check(own, columns)
        folder = prepare_output_dir(args.output_dir)
        report, numbers = run(own, columns)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    if folder is None:
        print("nothing was saved: there is no --output_dir")
        return 0
    content = {**facts, "environment": environment(), "benchmark": vars(own), "args": vars(args), **numbers}
    (folder / "bench_aux.md").write_text(report)
    (folder / "bench_aux.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"saved as {folder / 'bench_aux.md'} and {folder / 'bench_aux.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
