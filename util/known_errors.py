"""Errors of PyTorch that have a way out on the command line: `main.py` prints these words in place of a traceback."""

from __future__ import annotations

import os
import re
from argparse import Namespace

import torch

NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


def explain(error: RuntimeError, args: Namespace) -> str | None:
    """Return what a user can do about `error`, None if it is none of the known ones: then it is a fault of the code.

    Args:
        args: the command line; only what it leaves open is proposed.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(mark in text for mark in NO_MEMORY):
        return f"out of memory: {_first_sentences(text)}\nless memory, the mildest first:\n" + _lines(less_memory(args))
    if "Expected to have finished reduction in the prior iteration" in text:
        found = re.search(r"Parameter indices.*", text)
        return (
            f"some parameters took no part in the loss. {found.group() if found else ''}\n"
            "TORCH_DISTRIBUTED_DEBUG=INFO in front of the command names them. Take them out of the model or --freeze "
            "them; --find_unused_params looks for them in every step, which costs time"
        )
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return (
            f"{_first_sentences(text)}\nA loader process died, most often because memory ran out: give fewer "
            f"--num_workers (now {args.num_workers}), leave --cache_mode out, or, in a container, more shared memory "
            "(docker run --shm-size=8g). With --num_workers 0 an error of the data set shows itself"
        )
    if "EADDRINUSE" in text:
        return (
            f"port {os.environ.get('MASTER_PORT', '')} is taken by another run on this machine: set another "
            "MASTER_PORT, or start with configs/launch_dist.sh, which finds a free one"
        )
    return None


def less_memory(args: Namespace) -> list[str]:
    """Return the ways to less memory that this command line has not taken yet, the mildest first."""
    if args.infer:
        ways = [(args.infer_batch_size > 1, f"--infer_batch_size 1 (now {args.infer_batch_size})")]
    else:
        ways = [(args.eval_batch_size > 1, f"--eval_batch_size 1 (now {args.eval_batch_size})")]
    fragments = "sizes change from batch to batch and leave holes between them"
    ways.append(
        (
            torch.cuda.is_available() and "expandable_segments" not in os.environ.get(ALLOCATOR, ""),
            f"{ALLOCATOR}=expandable_segments:True in front of the command: {fragments}",
        )
    )
    if not (args.infer or args.eval or args.analyse):
        ways += _ways_of_training(args)
    ways.append((args.amp == "off", "--amp: activations in bfloat16"))
    size = f"--lsj_size (now {args.lsj_size})" if args.augment == "lsj" else f"--max_size (now {args.max_size})"
    ways.append((True, f"smaller images: a lower {size}; AP of small objects falls"))
    return [text for is_open, text in ways if is_open]


def _ways_of_training(args: Namespace) -> list[tuple[bool, str]]:
    parts = 2 if args.batch_size % 2 == 0 else args.batch_size
    smaller = f"--batch_size {args.batch_size // parts} --grad_accum_steps {args.grad_accum_steps * parts}"
    queries = [f"--{name} (now {getattr(args, name)})" for name in ("num_queries_one2many", "dn_number")]
    given = [text for text in queries if not text.endswith("(now 0)")]
    return [
        (not args.use_checkpoint, "--use_checkpoint: the transformer, and a Swin, compute twice what they do not keep"),
        (args.batch_size > 1, f"{smaller}: fewer images at once, the same number per step of the optimiser"),
        (bool(given), f"fewer queries of training: {', '.join(given)}"),
    ]


def _first_sentences(text: str) -> str:
    """Return the first line of an error, without the advice that PyTorch appends to it."""
    return text.strip().partition("\n")[0].partition(" See documentation")[0].partition(" If reserved")[0].strip()


def _lines(texts: list[str]) -> str:
    return "\n".join(f"  - {text}" for text in texts)
