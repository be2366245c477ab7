"""`main.py --export`: write a trained detector for other programs, and check that the file computes the same.

    python main.py --export onnx --resume out/checkpoint.pth --output_dir exported

writes `model.onnx` and `model.json`; `--export torch` writes `model.pt2`, which `torch.export.load` reads (for a GPU
see `torch.export.passes.move_to_device_pass`). What goes in and comes out says `models.exported`. Normalisation,
sigmoid and top-k are inside the graph, resizing and NMS are not. Parts that only training needs are not in it.

Graphs hold no operator of ours and no GridSample. NVIDIA/TensorRT#4813 reports that TensorRT compiles the decomposition
of GridSample wrongly: the engine builds, runs and is wrong, without a word. `ops.gather` looks rows up instead. If you
change the model, keep both out: the check after the export refuses them.

With `--export_dynamic` both sides of the canvas are multiples of the coarsest stride, so that the sizes of all levels
are plain products; a graph for any size holds thousands of operations on sizes and takes an hour to optimise. Put the
image into the corner of the next larger canvas and give its size.
"""

from __future__ import annotations

import importlib
import json
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import ops
from datasets.coco_names import COCO_NAMES
from models.exported import ExportedDetector
from ops.gather import portable
from util import dist
from util.checkpoint import native_weights, read_checkpoint, stored_class_names
from util.environment import prepare_output_dir
from util.errors import UserError
from util.pixels import IMAGENET_MEAN, IMAGENET_STD
from util.stored_flags import build_trained, flags_of

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OLDEST_FOR_ANY_SIZE = (2, 8)  # PyTorch's translation to ONNX fails on open sizes in 2.6; 2.7 was not tried


def export_command(args: Namespace) -> None:
    """Run `main.py --export KIND --resume CHECKPOINT --output_dir DIR`; UserError if the written file differs."""
    from util.export_check import check_file

    if args.export == "onnx":
        need_packages()
        if args.export_dynamic:
            need_open_sizes()
    try:
        ops.set_backend(args.ops_backend)
    except ValueError as error:
        raise UserError(f"--ops_backend {args.ops_backend}: {error}") from error
    folder = prepare_output_dir(args.output_dir)
    content = read_checkpoint(args.resume)
    # Files that do not say how their model is built need its flags on the command line.
    flags = flags_of(content, native_weights(content, args.resume)) or args
    model, trained, lines = build_trained(content, args.resume, flags, averaged=args.use_ema)
    for line in lines:
        dist.info(f"{args.resume}: {line}")
    topk = args.export_topk or trained.topk
    model.requires_grad_(False)
    wrapper = ExportedDetector(model, topk=topk, clip=trained.clip_boxes, group=trained.eval_group).eval()
    multiple = coarsest_stride(model)
    size = canvas(args, trained, multiple)

    start = time.perf_counter()
    program = record(wrapper, batch=args.export_batch, size=size, multiple=multiple if args.export_dynamic else None)
    path = folder / ("model.onnx" if args.export == "onnx" else "model.pt2")
    if args.export == "onnx":
        write_onnx(program, path, args.export_opset)
    else:
        torch.export.save(program, str(path))
    facts = description(args, trained, content, size=size, multiple=multiple, topk=topk, file=path.name)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    dist.info(f"wrote {path}, {path.stat().st_size / 2**20:.1f} MiB, in {time.perf_counter() - start:.0f} s")
    if trained.nms_iou or trained.soft_nms_iou:
        dist.info("--nms_iou and --soft_nms_iou of the training are not in the graph: model.json holds them")
    cases = [(args.export_batch, *size)]
    if args.export_dynamic:
        # The other size has its sides swapped; of a square one side is longer.
        other = (size[1], size[0]) if size[0] != size[1] else (size[0], size[1] + multiple)
        cases = [(batch, *sides) for sides in (size, other) for batch in (1, 2)]
    check_file(path, wrapper, cases, args.export_images)


def need_packages() -> None:
    """Raise UserError, with the line to type, if a package for ONNX is missing."""
    missing = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f"--export onnx needs {', '.join(missing)}: pip install {' '.join(PACKAGES)}")


def need_open_sizes() -> None:
    """Raise UserError if this PyTorch cannot translate graphs for any size."""
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_FOR_ANY_SIZE:
        oldest = ".".join(map(str, OLDEST_FOR_ANY_SIZE))
        raise UserError(
            f"--export onnx with --export_dynamic needs PyTorch {oldest} or later, found {torch.__version__}: "
            "leave out --export_dynamic for a file of one size, or export with a newer PyTorch (the checkpoint fits)"
        )


def coarsest_stride(model: nn.Module) -> int:
    """Return the stride of the coarsest level, pixels."""
    extra = len(model.input_proj) - len(model.backbone.strides)
    return model.backbone.strides[-1] * 2**extra


def canvas(args: Namespace, trained: Namespace, multiple: int) -> tuple[int, int]:
    """Return height and width of the canvas; with `--export_dynamic` of the first that is tried, whole multiples."""
    if args.export_size:
        size = tuple(args.export_size)
    elif trained.augment == "lsj":
        size = trained.lsj_size, trained.lsj_size
    elif trained.dataset_file == "synthetic":
        size = tuple(trained.synthetic_size)
    elif trained.test_size:
        size = trained.test_size, max(trained.max_size, trained.test_size)
    else:
        raise UserError("the checkpoint was evaluated with --test_size 0, any size: give --export_size H W")
    if args.export_dynamic:  # at least 2 multiples: a size of 1 cell would be written into the graph as a constant
        size = tuple(max(2, -(-side // multiple)) * multiple for side in size)
    return size


def record(wrapper: nn.Module, *, batch: int, size: tuple[int, int], multiple: int | None) -> ExportedProgram:
    """Return the graph of `wrapper`, made of operations that every runtime computes alike.

    Args:
        batch, size: of the images it is for.
        multiple: of both sides of the canvas, pixels, where number and sizes of the images stay open; None: fixed.

    Raises:
        UserError: where sizes stay open, and the canvas has fewer cells than a two-stage model has queries.
    """
    shapes = None
    if multiple is not None:
        batch = max(batch, 2)  # 1 would be written into the graph as a constant
        # PyTorch 2.6 wants a largest number; these are never reached.
        images, height, width = (Dim(name, min=1, max=1024) for name in ("batch", "height", "width"))
        shapes = {"images": {0: images, 2: multiple * height, 3: multiple * width}, "sizes": {0: images}}
    inputs = torch.zeros(batch, 3, *size, dtype=torch.uint8), torch.tensor([size]).repeat(batch, 1)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its kernel is an operator that only PyTorch has
    try:
        with portable(), torch.no_grad():
            return torch.export.export(wrapper, inputs, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError) as error:
        # PyTorch 2.6 finds the number of queries inconsistent with the range of open sizes.
        if "k not in range" not in str(error) and "is inconsistent" not in str(error):
            raise
        raise UserError(
            f"--export_size {size[0]} {size[1]}: on this canvas the encoder has fewer cells than the model has "
            "queries; give a larger one"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def write_onnx(program: ExportedProgram, path: Path, opset: int) -> None:
    """Translate a recorded graph to ONNX."""
    outputs = ["boxes", "scores", "labels"]
    options = {"dynamo": True, "opset_version": opset, "output_names": outputs, "verbose": False}
    torch.onnx.export(program, **options).save(str(path))


def description(
    args: Namespace,
    trained: Namespace,
    content: Mapping[str, Any],
    *,
    size: tuple[int, int],
    multiple: int,
    topk: int,
    file: str,
) -> dict[str, Any]:
    """Return what a program has to know to feed the file, for `model.json`."""
    names = stored_class_names(content)
    ids = content.get("category_ids")
    if names is None and trained.num_classes in (None, 91):  # published COCO weights: the index is the category's id
        names = [COCO_NAMES.get(i, "N/A") for i in range(91)]
        ids = [i if i in COCO_NAMES else -1 for i in range(91)]
    height, width = ("height", "width") if args.export_dynamic else size
    batch = "batch" if args.export_dynamic else args.export_batch
    return {
        "file": file,
        "checkpoint": str(args.resume),
        "epoch": content.get("epoch"),
        "torch": torch.__version__,
        "opset": args.export_opset if args.export == "onnx" else None,
        "inputs": {
            "images": {"shape": [batch, 3, height, width], "dtype": "uint8", "layout": "NCHW", "colour": "RGB"},
            "sizes": {"shape": [batch, 2], "dtype": "int64", "meaning": "height and width of each image, pixels"},
        },
        "outputs": {
            "boxes": {"dtype": "float32", "meaning": "xyxy in pixels of the images as given; best first"},
            "scores": {"dtype": "float32", "meaning": "0 to 1, descending"},
            "labels": {"dtype": "int64", "meaning": "index into class_names and category_ids"},
        },
        "canvas": {
            "multiple_of": multiple if args.export_dynamic else None,
            "smallest": 2 * multiple if args.export_dynamic else None,
            "place": "each image in the top-left corner",
            "cells": "with --two_stage and open sizes at least as many as there are queries",
        },
        "preprocessing": {
            "shorter_side": trained.lsj_size if trained.augment == "lsj" else trained.test_size,
            "longer_side_at_most": trained.lsj_size if trained.augment == "lsj" else trained.max_size,
            "filter": "bilinear, antialiased" if trained.antialias else "bilinear",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "normalisation": "inside the graph: pixels / 255, minus mean, over std",
        },
        "postprocessing": {
            "topk": topk,
            "clip_boxes": trained.clip_boxes,
            "not_in_the_graph": {"nms_iou": trained.nms_iou, "soft_nms_iou": trained.soft_nms_iou},
        },
        "class_names": names,
        "category_ids": ids,
    }
