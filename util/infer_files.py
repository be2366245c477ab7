"""What `main.py --infer` reads and writes: which files, under which ids and names."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from datasets.decode import turned_by_exif
from util.errors import UserError
from util.infer import Detections, Preparation, Prepared, read_image
from util.video import SUFFIXES as VIDEO_SUFFIXES

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .bmp .webp .tif .tiff .gif .ppm .pgm .avif".split())
PICTURES, VIDEOS = "pictures", "videos"  # folders below --output_dir
CSV_COLUMNS = ("file", "class", "score", "x1", "y1", "x2", "y2", "frame")


@dataclass
class Inputs:
    """Files to look at, each once, in the order of the command line and sorted within folders and patterns."""

    images: list[Path] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    left_out: set[Path] = field(default_factory=set)  # videos in folders: they are only taken when they are named


def find_inputs(names: Sequence[str], output_dir: Path) -> Inputs:
    """Return the files that `--infer` means: files, folders with all below them, and patterns (`**` for any depth).

    What an earlier run wrote into `output_dir` is left out, and so are hidden files.

    Raises:
        UserError: a name that stands for nothing.
    """
    inputs, seen = Inputs(), set()  # seen: resolved paths
    written = {(output_dir / name).resolve() for name in (PICTURES, VIDEOS)}
    for name in names:
        found = _files_of(name)
        if not Path(name).is_file():
            found = [path for path in found if not written & set(path.resolve().parents)]
        pictures = [path for path in found if not _is_video(path)]
        in_folder = Path(name).is_dir()
        if not found or (in_folder and not pictures):
            raise UserError(f"--infer {name}: {_nothing(name, len(found))}")
        inputs.left_out |= {path.resolve() for path in found if in_folder and _is_video(path)}
        for path in pictures if in_folder else found:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                (inputs.videos if _is_video(path) else inputs.images).append(path)
    inputs.left_out -= seen
    return inputs


def _files_of(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]  # whatever its suffix is: the user has named it
    if path.is_dir():
        below = ((path / part, part.parts) for part in (p.relative_to(path) for p in path.rglob("*")))
        found = [p for p, parts in below if not any(part.startswith(".") for part in parts)]
    else:
        found = [Path(match) for match in glob.glob(name, recursive=True)]
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    return sorted(p for p in found if p.suffix.lower() in known and p.is_file())


def _nothing(name: str, videos: int) -> str:
    """Return what is wrong with a name that stands for no file."""
    if Path(name).is_dir():
        if videos:
            return f"a folder without images; give its {videos} videos by name or as '{name.rstrip('/')}/*'"
        return f"a folder without images (known endings: {' '.join(sorted(IMAGE_SUFFIXES))})"
    return "no such file or folder, and no image or video matches it as a pattern"


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def image_ids(images: Sequence[Path], only_images: bool) -> list[int]:
    """Return an id for every image.

    Where all names are different numbers, as those of COCO (`000000000139.jpg`), it is the number, so that detections
    fit COCO's annotation files. Else, and where there are videos too, images are counted from 1.
    """
    stems = [path.stem for path in images]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit()]
    if only_images and len(set(numbers)) == len(images):
        return numbers
    return list(range(1, len(images) + 1))


class FileNames:
    """Gives every file a name of its own: `a`, and for later ones of that name `a_2`, `a_3`, ..."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, stem: str) -> str:
        """Return a name that nobody has; some file systems do not tell capitals apart."""
        name, number = stem, 1
        while name.lower() in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name.lower())
        return name


@dataclass
class Loaded:
    """An image file, or why there is none."""

    index: int
    prepared: Prepared | None = None
    pixels: Tensor | None = None  # (3, h, w) uint8 as in the file, where it will be drawn
    turned: bool = False  # its EXIF tag turns it
    error: str = ""


class ImageFiles(Dataset):
    """Image files made ready for the model; a broken one does not stop the others."""

    def __init__(self, paths: Sequence[Path], preparation: Preparation, *, keep_pixels: bool) -> None:
        self.paths, self.preparation, self.keep_pixels = list(paths), preparation, keep_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Loaded:
        try:
            pixels = read_image(self.paths[index])
        except UserError as error:
            return Loaded(index, error=str(error))
        turned = turned_by_exif(self.paths[index])
        return Loaded(index, self.preparation(pixels), pixels if self.keep_pixels else None, turned)


class ResultFiles:
    """Writes `detections.json`, `images.json` and, if wanted, `detections.csv`, detection by detection.

    Use it as a context manager: a run that is interrupted leaves whole files of what it did.
    """

    def __init__(self, folder: Path, categories: Sequence[dict[str, Any]], *, with_csv: bool) -> None:
        self.counts: Counter[str] = Counter()  # detections by class name
        self._folder, self._categories = folder, list(categories)
        self._images: list[dict[str, Any]] = []
        self._paths = [folder / "detections.json"] + [folder / "detections.csv"] * with_csv
        # File names that are no UTF-8 keep their bytes.
        how = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
        self._files = [_temporary(path).open("w", **how) for path in self._paths]
        self._csv = csv.writer(self._files[1]) if with_csv else None
        if self._csv:
            self._csv.writerow(CSV_COLUMNS)

    def add(self, image_id: int, file: str, found: Detections, **more: Any) -> None:
        """Add an image or a frame and its detections; `more` goes into its entry of `images.json`."""
        height, width = found.size
        self._images.append({"id": image_id, "file_name": file, "width": width, "height": height, **more})
        frame = {"frame": more["frame"]} if "frame" in more else {}
        rows = zip(found.boxes.double().tolist(), found.scores.double().tolist(), found.names, found.category_ids)
        for (x0, y0, x1, y1), score, name, category in rows:
            entry = {"image_id": image_id, "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            self._files[0].write(",\n" if self.counts.total() else "[\n")
            self._files[0].write(json.dumps(entry | {"file_name": file} | frame))
            self.counts[name] += 1
            if self._csv:
                numbers = [f"{score:.4f}", *(f"{side:.2f}" for side in (x0, y0, x1, y1))]
                self._csv.writerow([file, name, *numbers, frame.get("frame", "")])

    def __enter__(self) -> ResultFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._files[0].write("\n]\n" if self.counts.total() else "[]\n")
        for file, path in zip(self._files, self._paths):
            file.close()
            os.replace(_temporary(path), path)
        listed = {"images": self._images, "annotations": [], "categories": self._categories}
        (self._folder / "images.json").write_text(json.dumps({"info": {}} | listed, indent=1) + "\n")

    def written(self) -> Iterable[str]:
        """Return the names of the files."""
        return [path.name for path in self._paths] + ["images.json"]


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
