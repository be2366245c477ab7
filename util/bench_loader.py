"""Images per second and core of the loader, beside the usual way over PIL images.

python util/benchmark.py loader                     640 x 480 JPEGs made on the spot, of about 75 kB
python util/benchmark.py loader --data FOLDER       the JPEGs of a folder

*PIL* decodes and augments PIL images, then converts to float and normalises, all in the loader. *tensors* is what
training does: uint8 tensors from the decoder to the device, which normalises a whole batch (`ImageBatch.normalized`).
Both take turns in every repetition, on the same files, objects and random numbers. They must give the same boxes, and
pixels within `LEVELS` of each other, which is checked before anything is timed (exit status 1 if not).

The times are CPU seconds of this process with one thread, so a loader process has them too, and W processes on W cores
load W times as much. Files are in memory: what reading them costs depends on the disk. Not in the numbers: a loader
process hands its batch over in shared memory, four times as many bytes when they are float.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from datasets import build_transforms
from datasets.base import mixed_seed
from datasets.collate import collate
from datasets.decode import decode_rgb
from datasets.transforms import Image
from ops.benchmark_record import compared, cpu_name, record
from util.args import get_args_parser
from util.bench_common import check_least, markdown_table, ratio
from util.environment import environment
from util.errors import UserError
from util.pixels import IMAGENET_MEAN, IMAGENET_STD
from util.structures import ImageBatch, Target

STEPS = ("decode", "augment", "convert", "collate")
OBJECTS = 7  # per image, about the mean of COCO
# Grey levels by which pixels may differ: torch 2.6 rounds every resize in another way than PIL, and a crop has two.
LEVELS = 1 if torch.__version__ >= torch.torch_version.TorchVersion("2.15") else 2


@dataclass(frozen=True)
class Way:
    """One way from encoded files to batches; both augment with the same transform."""

    name: str
    decode: Callable[[bytes], Image]
    convert: Callable[[Image], Tensor] | None = None  # to what is collated; None: it is that already


def decode_pil(content: bytes) -> PIL.Image.Image:
    """Return the RGB image of a file."""
    return PIL.Image.open(io.BytesIO(content)).convert("RGB")


def normalize_pil(image: PIL.Image.Image) -> Tensor:
    """Return the image as float32 (3, h, w), normalised."""
    return F.normalize(F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD)


PIL_WAY = Way("PIL", decode_pil, normalize_pil)
OUR_WAY = Way("tensors", decode_rgb)

Batch = tuple[ImageBatch, list[Target]]


def load_batch(way: Way, files: Sequence[bytes], transforms: nn.Module, seed: int) -> tuple[Batch, dict[str, float]]:
    """Return the batch of these encoded images and the CPU seconds of every step.

    Args:
        seed: of objects and augmentation; both ways draw the same from the same seed.
    """
    seconds, samples = dict.fromkeys(STEPS, 0.0), []

    def timed(step: str, call: Callable, *inputs):
        start = process_time()
        result = call(*inputs)
        seconds[step] += process_time() - start
        return result

    for index, content in enumerate(files):
        image = timed("decode", way.decode, content)
        torch.manual_seed(mixed_seed(seed, index))
        image, sample = timed("augment", transforms, image, random_sample(*F.get_size(image), index))
        samples.append((timed("convert", way.convert, image) if way.convert else image, sample))
    return timed("collate", collate, samples), seconds


def random_sample(height: int, width: int, image_id: int) -> dict:
    """Return `OBJECTS` random objects of an image, as a data set describes them."""
    sides = torch.tensor([width, height, width, height])
    corners = torch.rand(OBJECTS, 2) * 0.8
    boxes = torch.cat([corners, corners + 0.05 + 0.15 * torch.rand(OBJECTS, 2)], 1) * sides
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(OBJECTS),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "iscrowd": torch.zeros(OBJECTS, dtype=torch.int64),
        "image_id": image_id,
        "orig_size": (height, width),
    }


def difference(pil: Batch, tensors: Batch) -> dict[str, float | bool]:
    """Return the largest difference of pixels in grey levels, their mean difference, and whether all boxes are equal.

    Raises:
        ValueError: images of different sizes.
    """
    (images, targets), (ours, our_targets) = pil, tensors
    if images.sizes != ours.sizes:
        raise ValueError(f"images of sizes {images.sizes} and {ours.sizes}: the augmentation drew other numbers")
    levels = 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    apart = ((images.pixels - ours.normalized().pixels) * levels).abs()
    same = all(torch.equal(a.boxes, b.boxes) for a, b in zip(targets, our_targets, strict=True))
    return {"grey_levels": apart.max().item(), "mean_grey_levels": apart.mean().item(), "same_boxes": same}


def generated_files(count: int, size: tuple[int, int] = (480, 640)) -> list[bytes]:
    """Return JPEGs of coloured noise on several scales, quality 92 with halved chroma, as in photographs."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        pixels = rng.normal(128, 3, (*size, 3))
        for cells, strength in ((6, 50), (24, 25), (96, 12)):
            coarse = rng.normal(0, strength, (cells * 3 // 4, cells, 3)).astype(np.float32)
            smooth = torch.from_numpy(coarse).permute(2, 0, 1)[None]
            pixels += nn.functional.interpolate(smooth, size, mode="bicubic")[0].permute(1, 2, 0).numpy()
        file = io.BytesIO()
        PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92, subsampling="4:2:0")
        files.append(file.getvalue())
    return files


def read_files(folder: str, count: int) -> list[bytes]:
    """Return the first `count` JPEGs of a folder and those below it, in the order of their names.

    Raises:
        UserError: there is none.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
    if not paths:
        raise UserError(f"--data {folder}: there is no .jpg or .jpeg file in it; give a folder of images")
    return [path.read_bytes() for path in paths]


def measure(files: Sequence[bytes], transforms: nn.Module, own: Namespace) -> tuple[dict, dict]:
    """Return the largest differences, and the CPU milliseconds per image by way and step, one per repetition."""
    batches = [files[i : i + own.batch_size] for i in range(0, len(files), own.batch_size)]
    found = {"grey_levels": 0.0, "mean_grey_levels": 0.0, "same_boxes": True}
    samples: dict[str, dict[str, list[float]]] = {way.name: defaultdict(list) for way in (PIL_WAY, OUR_WAY)}
    for repetition in range(-1, own.repeats):  # the first one warms up
        total = {way.name: dict.fromkeys(STEPS, 0.0) for way in (PIL_WAY, OUR_WAY)}
        for number, batch in enumerate(batches):
            seed, loaded = mixed_seed(own.seed, repetition + 1, number), []
            for way in (PIL_WAY, OUR_WAY):
                result, seconds = load_batch(way, batch, transforms, seed)
                loaded.append(result)
                for step, value in seconds.items():
                    total[way.name][step] += 1000 * value / len(files)
            if repetition < 0:
                new = difference(*loaded)
                found["same_boxes"] &= new["same_boxes"]
                found["grey_levels"] = max(found["grey_levels"], new["grey_levels"])
                found["mean_grey_levels"] += new["mean_grey_levels"] / len(batches)
        for name, steps in total.items() if repetition >= 0 else ():
            for step, value in [*steps.items(), ("all", sum(steps.values()))]:
                samples[name][step].append(value)
    return found, samples


def table(samples: dict[str, dict[str, list[float]]]) -> str:
    """Return CPU milliseconds per image by step and images/s per core: medians, ranges, ratio of the ways."""
    pil, ours = samples[PIL_WAY.name], samples[OUR_WAY.name]
    rows = [["CPU ms per image", *samples, "ratio"]]
    for step in (*STEPS, "all"):
        rows.append([step, _spread(pil[step], 2), _spread(ours[step], 2), ratio(median(pil[step]), median(ours[step]))])
    rates = [[1000 / ms for ms in way["all"]] for way in (pil, ours)]
    gain = sorted(b / a for a, b in zip(*rates))
    rows.append(["images/s per core", *(_spread(rate, 0) for rate in rates), _spread(gain, 2)])
    return markdown_table(rows)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def get_parser() -> argparse.ArgumentParser:
    """Return the flags of this benchmark."""
    parser = argparse.ArgumentParser(prog="util/benchmark.py loader", description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="", help="folder with .jpg files; empty: images made on the spot")
    parser.add_argument("--images", default=32, type=int, help="number of images, the first of the folder")
    parser.add_argument("--batch_size", default=2, type=int, help="images collated together")
    parser.add_argument("--repeats", default=9, type=int, help="repetitions after one to warm up")
    parser.add_argument("--seed", default=42, type=int, help="of the augmentation")
    parser.add_argument("--output", default="", help="JSON file for all numbers; empty: none")
    return parser


def run(own: Namespace, args: Namespace) -> dict:
    """Measure, print and return everything."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        files = read_files(own.data, own.images) if own.data else generated_files(own.images)
        found, samples = measure(files, build_transforms("train", args), own)
    finally:
        torch.set_num_threads(threads)
    print(
        f"{len(files)} JPEGs of {sum(map(len, files)) / len(files) / 1000:.0f} kB "
        f"({own.data or '640 x 480, made on the spot'}), batches of {own.batch_size}, augmentation {args.augment}, "
        f"shorter sides {min(args.train_scales)} to {max(args.train_scales)}, at most {args.max_size}; one thread of "
        f"{cpu_name()}; medians of {own.repeats} repetitions, in brackets their range\n\n{table(samples)}\n"
    )
    print(
        f"pixels differ by {found['grey_levels']:.2f} grey levels at most, {found['mean_grey_levels']:.3f} on average; "
        f"the boxes are {'identical' if found['same_boxes'] else 'NOT identical'}\n"
    )
    print("\n".join(line for line in environment() if line.startswith(("python", "torch", "pillow"))), flush=True)
    return {"images": len(files), **found, "ms": samples}


def figures(result: dict, own: Namespace, args: Namespace) -> list[dict]:
    """Return the CPU milliseconds per image, medians and ranges."""
    plain, ours = (result["ms"][way.name]["all"] for way in (PIL_WAY, OUR_WAY))
    case = {"images": result["images"], "data": Path(own.data).name, "batch": own.batch_size, "augment": args.augment}
    return [compared("loader", case, plain, ours)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if the ways differ, 2 after a mistake of the user."""
    own, rest = get_parser().parse_known_args(argv)
    args, facts = get_args_parser().parse_args(rest), record()
    try:
        check_least(own, {"images": 1, "batch_size": 1, "repeats": 1})
        result = run(own, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if own.output:
        content = {**facts, "environment": environment(), "benchmark": vars(own), **result}
        content["figures"] = figures(result, own, args)
        Path(own.output).write_text(json.dumps(content, indent=1) + "\n")
    return 0 if result["same_boxes"] and result["grey_levels"] <= LEVELS + 0.001 else 1


if __name__ == "__main__":
    sys.exit(main())
