"""The image files of a set: which are missing, unreadable or of another size, and which are in two sets."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import NamedTuple

import numpy as np

from datasets.files import ImageFiles
from util.check_data_survey import REFUSED, Survey
from util.dist import info
from util.errors import UserError

CHUNK = 1000  # files given to the threads at once
SAY_EVERY = 10.0  # seconds between progress lines
NOT_THERE = "image files that do not exist"
IMAGE_REFUSED = "the loader stops with an error when it comes to this image"


class Look(NamedTuple):
    """What was seen of one file."""

    fault: str  # kind, "" if it is usable
    message: str
    size: tuple[int, int]  # h, w; 0 if it is not known
    bytes: int  # of the file


def look(files: ImageFiles, index: int, *, decode: bool) -> Look:
    """Look at one file: at its header only, or with `decode` at all pixels, as training does."""
    try:
        length = files.path(index).stat().st_size
    except OSError:
        return Look(NOT_THERE, str(files.missing(index)), (0, 0), 0)
    kind, size = "image files that cannot be read", (0, 0)
    try:
        size = files.header_size(index)
        kind = "image files with another size than the annotation file says"
        files.check_size(index, size)
        kind = "image files whose pixels cannot be decoded"
        if decode:
            files.decode(index, files.read(index))
    except UserError as error:
        return Look(kind, str(error), size, length)
    return Look("", "", size, length)


def look_at_files(result: Survey, files: ImageFiles, *, decode: bool, threads: int) -> np.ndarray:
    """Look at all files of a set; add what is wrong and take over their sizes. Return (images,) their bytes."""
    seen: list[Look] = []
    began = said = time.monotonic()
    with ThreadPoolExecutor(max(threads, 1)) as pool:  # waiting for disks and decoding happen outside Python
        for first in range(0, len(files), CHUNK):
            part = range(first, min(first + CHUNK, len(files)))
            seen += pool.map(lambda index: look(files, index, decode=decode), part)
            now = time.monotonic()
            if now - said > SAY_EVERY and len(seen) < len(files):
                left = timedelta(seconds=int((now - began) / len(seen) * (len(files) - len(seen))))
                info(f"{result.part}: {len(seen)} of {len(files)} image files looked at, eta: {left}")
                said = now
    kinds: dict[str, list[int]] = {}
    for index, one in enumerate(seen):
        if one.fault:
            kinds.setdefault(one.fault, []).append(index)
        elif not result.sizes[index].all():
            result.sizes[index] = one.size
    for kind, indices in kinds.items():
        names = [result.entries[index]["file_name"] for index in indices]
        message = seen[indices[0]].message
        if kind == NOT_THERE and len(indices) == len(files):
            message += f". Not one of the files is there: is {files.folder} the right folder?"
        result.add(REFUSED, kind, names, IMAGE_REFUSED, message)
    return np.asarray([one.bytes for one in seen], np.int64)


def in_both(train: ImageFiles, val: ImageFiles, bytes_of: tuple[np.ndarray, np.ndarray] | None) -> list[str]:
    """Return `training file = validation file` of the images that are in both sets.

    Args:
        bytes_of: length of every file of both sets: files of equal length are read and compared by content, whatever
            they are called. None: nothing is read, a file is the same if its path is.
    """
    if bytes_of is None:
        paths = {train.path(i).resolve() for i in range(len(train))}
        return [str(val.path(i)) for i in range(len(val)) if val.path(i).resolve() in paths]
    lengths, others = bytes_of
    shared = np.intersect1d(lengths[lengths > 0], others)
    content = {_digest(val, i): i for i in np.flatnonzero(np.isin(others, shared)).tolist()}
    found = [(i, content.get(_digest(train, i))) for i in np.flatnonzero(np.isin(lengths, shared)).tolist()]
    return [f"{train.path(i)} = {val.path(j)}" for i, j in found if j is not None]


def _digest(files: ImageFiles, index: int) -> bytes:
    return hashlib.blake2b(files.path(index).read_bytes(), digest_size=16).digest()
