"""Videos in and out, through PyAV (the optional package `av`, which brings its codecs)."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from util.errors import UserError

SUFFIXES = frozenset(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ts .3gp .ogv".split())
CODECS = ("libx264", "mpeg4")  # the first that this build of PyAV has
USUAL_RATE, FASTEST = Fraction(25), Fraction(240)  # frames per second, where a file says nothing or nonsense


class Frame(NamedTuple):
    """One picture of a video."""

    number: int  # from 0
    seconds: float  # when it is shown
    pixels: np.ndarray  # (h, w, 3) uint8 RGB, turned as players show it


def import_av() -> ModuleType:
    """Return PyAV; UserError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"videos need the package av, which is missing ({error}): pip install av") from error
    return av


class VideoReader:
    """The frames of a video file, one after the other.

    Attributes:
        rate: frames per second.
        total: number of frames as far as the file says, else 0.

    Raises:
        UserError: no video, or one that cannot be read; names the file.
    """

    def __init__(self, path: Path) -> None:
        av = import_av()
        self.path, self._errors = path, av.error.FFmpegError
        try:
            self._container = av.open(str(path))
        except self._errors as error:
            raise UserError(f"video {path} cannot be read: {error.strerror}") from error
        if not self._container.streams.video:
            self._container.close()
            raise UserError(f"video {path} has no pictures, only {len(self._container.streams)} other streams")
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = stream.average_rate or USUAL_RATE
        self.rate = Fraction(rate) if 0 < rate <= FASTEST else USUAL_RATE
        length = self._container.duration
        self.total = stream.frames or (round(length / av.time_base * self.rate) if length else 0)

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames; UserError where the file breaks off, after those before."""
        number = 0
        try:
            for number, frame in enumerate(self._decoded(), start=1):
                pixels = frame.to_ndarray(format="rgb24")
                turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counterclockwise; not in old versions of PyAV
                seconds = float((number - 1) / self.rate if frame.time is None else frame.time)
                yield Frame(number - 1, seconds, np.ascontiguousarray(np.rot90(pixels, turns)))
        except self._errors as error:
            raise UserError(f"video {self.path} breaks off after {number} frames: {error.strerror}") from error
        finally:
            self._container.close()
        if number == 0:
            raise UserError(f"video {self.path} has no frames")

    def _decoded(self) -> Iterator[Any]:
        return self._container.decode(video=0)


class VideoWriter:
    """Writes pictures into an .mp4 file without sound; the first one gives its size.

    Use it as a context manager, so that the file is complete whatever happens.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        av = import_av()
        self._av, self._container = av, av.open(str(path), "w")
        codec = next(name for name in CODECS if name in av.codecs_available)
        # No more digits than the codecs' clocks have.
        self._stream = self._container.add_stream(codec, rate=rate.limit_denominator(1001))
        self._stream.pix_fmt = "yuv420p"  # what every player shows
        self._size: tuple[int, int] | None = None

    def add(self, picture: Image.Image) -> None:
        """Append an RGB picture."""
        if self._size is None:
            self._size = tuple(side + side % 2 for side in picture.size)  # yuv420p has half as many colours
            self._stream.width, self._stream.height = self._size
        if picture.size != self._size:
            picture = picture.resize(self._size)
        frame = self._av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._size is not None:
            self._container.mux(self._stream.encode())
        self._container.close()
