"""A tiny checkpoint with detections of all scores, and noisy images, for the tests of inference."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models import build_detector
from tests.tiny import TINY, TWO_STAGE, tiny_args
from tests.unit.small_coco import annotation, content, write
from util.environment import plain_args

# Not TINY's width: one channel per group of a norm and one cell of a map are too few numbers for PyTorch.
MODEL = f"{TWO_STAGE} --hidden_dim 64 --test_size 64 --max_size 96"
NAMES, IDS = ["kind 5", "kind 9", "N/A", "N/A"], [5, 9, -1, -1]
SIZES = {1: (40, 30), 2: (25, 60), 3: (64, 64)}  # width and height by image id


def checkpoint(path: Path, flags: str = "", without: tuple[str, ...] = (), **more) -> Path:
    """Write a checkpoint of a tiny model with the classes of `small_coco`; scores spread over 0..1."""
    args = tiny_args(f"{MODEL} {flags}")
    model = build_detector(args).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "class_embed" in name and value.ndim == 1:
                value.copy_(torch.tensor([0.0, 0.0, -1.0, -1.0]))  # fewer detections of what is no category
            elif "class_embed" in name:
                torch.nn.init.normal_(value, std=0.3)
            if "bbox_embed" in name and name.endswith("layers.2.weight"):
                torch.nn.init.normal_(value, std=0.2)
    stored = {"format": 1, "model": model.state_dict(), "epoch": 3, "args": plain_args(args)}
    stored |= {"class_names": NAMES, "category_ids": IDS, **more}
    torch.save({key: value for key, value in stored.items() if key not in without}, path)
    return path


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return coloured noise."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def coco(folder: Path) -> Path:
    """Write three images of different sizes, 1.png to 3.png, and their annotation file; return its path."""
    data = content([annotation(1, 1, [2, 3, 10, 12]), annotation(2, 3, [20, 20, 30, 9], category_id=9)], images=3)
    for entry in data["images"]:
        entry["width"], entry["height"] = SIZES[entry["id"]]
        noise(*SIZES[entry["id"]], seed=entry["id"]).save(folder / entry["file_name"])
    return write(folder, data)


def eval_command(file: Path, annotations: Path, output_dir: Path, more: str = "") -> list[str]:
    """Return the command line of `main.py --eval` with the flags of the model."""
    data = f"--val_images {annotations.parent} --val_json {annotations} --num_workers 0 --device cpu"
    less = "--no-eval_loss --no-eval_curves --draw 0"
    return f"{TINY} {MODEL} {data} {less} --eval --resume {file} --output_dir {output_dir} {more}".split()


def infer_command(file: Path, *inputs: Path | str, output_dir: Path, more: str = "") -> list[str]:
    """Return the command line of `main.py --infer`."""
    words = f"--resume {file} --output_dir {output_dir} --device cpu --num_workers 0 {more}"
    return ["--infer", *map(str, inputs), *words.split()]


def published(**args) -> Namespace:
    """Return what published files hold under `args`, as far as it matters; `args` on top."""
    usual = {"lr": 2e-4, "nheads": 8, "enc_layers": 6, "dec_layers": 6, "hidden_dim": 256, "num_queries": 300}
    usual |= {"enc_n_points": 4, "dec_n_points": 4, "num_feature_levels": 4, "backbone": "resnet50", "masks": False}
    usual |= {"dilation": False, "position_embedding": "sine", "position_embedding_scale": 2 * torch.pi}
    return Namespace(**usual | args)
