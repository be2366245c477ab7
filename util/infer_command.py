"""`main.py --infer PATH ...`: detections of images and videos that nobody annotated.

    python main.py --infer photos/ clip.mp4 --resume checkpoint.pth --output_dir out

writes below `out`:

    detections.json    every detection as a COCO results list, with original category ids, `file_name` and `frame`
    images.json        every image and frame with its id, size and picture, and the classes, as a COCO-format file:
                       `COCO("images.json").loadRes("detections.json")`
    detections.csv     the same for spreadsheets (--infer_csv)
    pictures/, videos/ the same drawn; small images are enlarged and large ones reduced, so that labels can be read

An id is the number in the file name where all names are different numbers, else a count from 1; frames of videos count
on from the images.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.data import DataLoader

import ops
from util import dist
from util.checkpoint import native_weights, read_checkpoint
from util.compile import prepare
from util.environment import prepare_output_dir
from util.errors import UserError
from util.infer import Predictor, build_predictor, model_flags, with_given
from util.infer_args import USE_FLAGS, thresholds
from util.infer_files import PICTURES, VIDEOS, FileNames, ImageFiles, Inputs, ResultFiles, find_inputs, image_ids
from util.stored_flags import MODEL_FLAGS, flags_of
from util.video import Frame, VideoReader, VideoWriter, import_av

LINE_EVERY = 5.0  # seconds between progress lines
JPEG_QUALITY = 90
SHOWN = 8  # broken files and classes that are named
T = TypeVar("T")


def infer_command(args: Namespace) -> None:
    """Run `main.py --infer`.

    Raises:
        UserError: nothing to read, a checkpoint that does not work, or, when all else is done, files that were skipped.
    """
    launch = dist.read_launch(os.environ, args.local_rank)
    if launch is not None and launch.world_size > 1:
        raise UserError("--infer runs in one process: start it with python main.py")
    folder = prepare_output_dir(args.output_dir)
    inputs = find_inputs(args.infer, folder)
    if inputs.videos:
        import_av()
    try:
        ops.set_backend(args.ops_backend)
    except ValueError as error:
        raise UserError(f"--ops_backend {args.ops_backend}: {error}") from error
    device = dist.pick_device(args.device)
    predictor = predictor_of(args, device)
    dist.info(f"{counted(len(inputs.images), 'image')}, {counted(len(inputs.videos), 'video')}; device {device}")
    if inputs.left_out:
        dist.info(f"left out, videos are only taken by name or pattern: {counted(len(inputs.left_out), 'video')}")
    try:
        with ResultFiles(folder, predictor.categories(), with_csv=args.infer_csv) as results:
            job = Job(predictor, results, folder, draw=args.infer_draw, batch_size=args.infer_batch_size)
            job.images(inputs, num_workers=args.num_workers)
            job.videos(inputs)
    except OSError as error:  # what cannot be read does not come here
        raise UserError(f"--output_dir {folder}: cannot write there ({error}). Is the disk full?") from error
    job.tell()


def predictor_of(args: Namespace, device: torch.device) -> Predictor:
    """Return the predictor of `--resume`, built as the file says and used as the command line says."""
    name = args.resume
    content = read_checkpoint(name)
    flags = flags_of(content, native_weights(content, name))
    given = {flag: getattr(args, flag) for flag in args.given_flags}
    if flags is not None:
        for flag in (flag for flag in MODEL_FLAGS if flag in given and given[flag] != getattr(flags, flag)):
            dist.info(f"--{flag} {given[flag]} is {getattr(flags, flag)} in {name}, which decides about its model")
        flags = with_given(flags, {flag: value for flag, value in given.items() if flag in USE_FLAGS})
    else:
        flags = args if set(given) & set(MODEL_FLAGS) else model_flags(content, name)
    general, named = thresholds(args.score_threshold)
    predictor = build_predictor(
        content,
        name,
        flags,
        device,
        averaged=args.use_ema,
        score_threshold=general,
        class_thresholds=named,
        classes=args.infer_classes or None,
        amp=args.amp,
    )
    prepare(predictor.model, channels_last=args.channels_last, compiled=args.compile)
    return predictor


@dataclass
class Job:
    """One run over all inputs."""

    predictor: Predictor
    results: ResultFiles
    folder: Path
    draw: bool
    batch_size: int
    names: FileNames = field(default_factory=FileNames)
    broken: list[str] = field(default_factory=list)  # messages about what could not be read
    turned: int = 0  # images that viewers turn
    done: int = 0  # images and frames
    next_id: int = 1

    def images(self, inputs: Inputs, *, num_workers: int) -> None:
        """Detect in the images and draw them."""
        paths = inputs.images
        ids = image_ids(paths, only_images=not inputs.videos)
        self.next_id = max(ids, default=0) + 1
        files = ImageFiles(paths, self.predictor.transform, keep_pixels=self.draw)
        # A loader process costs about a second to start: not for a handful of images.
        workers = min(num_workers, len(paths) // 8)
        loader = DataLoader(files, batch_size=self.batch_size, num_workers=workers, collate_fn=list)
        progress = Progress("images", len(paths))
        if self.draw:
            (self.folder / PICTURES).mkdir(exist_ok=True)
        for batch in loader:
            self.broken += [loaded.error for loaded in batch if loaded.error]
            usable = [loaded for loaded in batch if not loaded.error]
            found = self.predictor.detect([loaded.prepared for loaded in usable]) if usable else []
            for loaded, detections in zip(usable, found):
                more = {}
                if self.draw:
                    more["picture"] = f"{PICTURES}/{self.names.take(paths[loaded.index].stem)}.jpg"
                    picture = self.predictor.draw(loaded.pixels, detections)
                    picture.save(self.folder / more["picture"], quality=JPEG_QUALITY)
                self.results.add(ids[loaded.index], str(paths[loaded.index]), detections, **more)
                self.turned += loaded.turned
            self.done += len(usable)
            progress.step(len(batch))

    def videos(self, inputs: Inputs) -> None:
        """Detect in every frame of the videos and draw them."""
        names = FileNames()
        if inputs.videos and self.draw:
            (self.folder / VIDEOS).mkdir(exist_ok=True)
        for path in inputs.videos:
            try:
                self._video(path, f"{VIDEOS}/{names.take(path.stem)}.mp4")
            except UserError as error:
                self.broken.append(str(error))

    def _video(self, path: Path, picture: str) -> None:
        video = VideoReader(path)
        progress = Progress(path.name, video.total)
        drawn = {"video": picture} if self.draw else {}
        with VideoWriter(self.folder / picture, video.rate) if self.draw else nullcontext() as writer:
            for frames in batches(video, self.batch_size):
                self._frames(path, frames, writer, drawn)
                progress.step(len(frames))
        progress.end()

    def _frames(self, path: Path, frames: list[Frame], writer: VideoWriter | None, drawn: dict[str, str]) -> None:
        found = self.predictor.detect([self.predictor.transform(frame.pixels) for frame in frames])
        for frame, detections in zip(frames, found):
            when = {"frame": frame.number, "seconds": round(frame.seconds, 4)}
            self.results.add(self.next_id, str(path), detections, **when, **drawn)
            self.next_id += 1
            self.done += 1
            if writer is not None:
                writer.add(self.predictor.draw(frame.pixels, detections))

    def tell(self) -> None:
        """Say what was found and where it is; UserError if files were skipped."""
        counts = self.results.counts
        common = ", ".join(f"{count} {name}" for name, count in counts.most_common(SHOWN))
        more = ", ..." if len(counts) > SHOWN else ""
        found, seen = counted(counts.total(), "detection"), counted(self.done, "image or frame", "images and frames")
        dist.info(f"{found} in {seen}{': ' * bool(common)}{common}{more}")
        if self.turned:
            dist.info(
                f"{counted(self.turned, 'image')} with an EXIF tag by which viewers turn it: taken as stored, as in "
                "training; so are boxes and pictures"
            )
        drawn = [f"{name}/" for name in (PICTURES, VIDEOS) if self.draw and (self.folder / name).is_dir()]
        dist.info(f"outputs are in {self.folder}: {', '.join([*self.results.written(), *drawn])}")
        if self.broken:
            rest = f"\n  ... and {len(self.broken) - SHOWN} more" if len(self.broken) > SHOWN else ""
            raise UserError(
                f"{counted(len(self.broken), 'file')} could not be read and left out; the others are done:\n  "
                + "\n  ".join(self.broken[:SHOWN])
                + rest
            )


def counted(number: int, noun: str, many: str = "") -> str:
    """Return "1 image" or "2 images"."""
    return f"{number} {noun if number == 1 else many or noun + 's'}"


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items, the last one shorter; an error in `items` comes after those before it."""
    batch: list[T] = []
    failure = None
    iterator = iter(items)
    while failure is None:
        try:
            batch.append(next(iterator))
        except (StopIteration, UserError) as error:
            failure = error
        if batch and (failure is not None or len(batch) == size):
            yield batch
            batch = []
    if isinstance(failure, UserError):
        raise failure


class Progress:
    """Prints a line with speed and remaining time now and then, and at the end.

    Args:
        what: beginning of the line.
        total: number of steps, 0 where it is not known.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._began = self._last = time.monotonic()
        self._told = 0

    def step(self, count: int) -> None:
        """Count, and print if it is time."""
        self.done += count
        if time.monotonic() - self._last >= LINE_EVERY or self.done == self.total:
            self._tell()

    def end(self) -> None:
        """Print the last line where the number of steps was not known before."""
        if self._told < self.done:
            self.total = self.done
            self._tell()

    def _tell(self) -> None:
        self._last, self._told = time.monotonic(), self.done
        speed = self.done / max(self._last - self._began, 1e-9)
        left = timedelta(seconds=int(max(self.total - self.done, 0) / speed))
        of, eta = (f"/{self.total}", f"  eta: {left}") if self.total else ("", "")
        dist.info(f"{self.what} [{self.done}{of}]{eta}  {speed:.1f} per second")
