"""The image files that an annotation file lists: their bytes, their pixels, and what is wrong with unusable ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from datasets.decode import decode_rgb
from util.errors import UserError


class ImageFiles:
    """The files of `entries`, by their place in this list.

    Args:
        folder: that the `file_name`s are relative to.
        entries: of the list `images` of the annotation file; a size is checked where it has one.
        source: the annotation file, for messages.
    """

    def __init__(self, folder: Path, entries: Sequence[dict], source: Path) -> None:
        self.folder, self.source = folder, source
        self.ids: list[int] = [image["id"] for image in entries]
        # Arrays: workers share their pages, which python objects would not allow.
        self._names = np.asarray([image["file_name"] for image in entries], dtype=np.str_)
        self._sizes = np.asarray([(image.get("height") or 0, image.get("width") or 0) for image in entries], np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> Path:
        """Return where the file should be."""
        return self.folder / str(self._names[index])

    def read(self, index: int) -> bytes:
        """Return the content of the file.

        Raises:
            UserError: it does not exist or cannot be read.
        """
        try:
            return self.path(index).read_bytes()
        except FileNotFoundError as error:
            raise self.missing(index) from error
        except OSError as error:
            raise self._unreadable(index, error) from error

    def decode(self, index: int, content: bytes) -> Tensor:
        """Return the pixels of the file, whose content this is, as uint8 RGB (3, h, w).

        Raises:
            UserError: it is no image, or its size is not that of the annotation file.
        """
        try:
            image = decode_rgb(content)
        except Exception as error:  # a decoder may raise anything over a broken file
            raise self._unreadable(index, error) from error
        self.check_size(index, tuple(image.shape[1:]))
        return image

    def header_size(self, index: int) -> tuple[int, int]:
        """Return (h, w) as the file says it; reads only its beginning.

        Raises:
            UserError: it is no image, or does not exist.
        """
        try:
            with Image.open(self.path(index)) as image:
                return image.height, image.width
        except FileNotFoundError as error:
            raise self.missing(index) from error
        except Exception as error:
            raise self._unreadable(index, error) from error

    def check_size(self, index: int, found: tuple[int, int]) -> None:
        """Raise a UserError if the annotation file gives the image another size than `found` (h, w)."""
        noted, (height, width) = tuple(self._sizes[index].tolist()), found
        if all(noted) and noted != (height, width):
            raise UserError(
                f"image file {self.path(index)} (image id {self.ids[index]}) is {width} x {height}, "
                f"the annotation file says {noted[1]} x {noted[0]}: its boxes would be wrong. Was it resized, or "
                "turned by its EXIF tag, after it was annotated? Mend the file or its entry"
            )

    def check_folder(self, flag: str) -> None:
        """Raise a UserError if the first file is not there; `flag` named the folder."""
        if not self.path(0).is_file():
            raise UserError(f"{self._not_there(0)}; is {self.folder} the right folder? It is given by {flag}")

    def missing(self, index: int) -> UserError:
        """Return the error about a file that does not exist."""
        return UserError(f"{self._not_there(index)}; restore it or take it out of the annotation file")

    def _not_there(self, index: int) -> str:
        return f"image file {self.path(index)} (image id {self.ids[index]} of {self.source}) does not exist"

    def _unreadable(self, index: int, error: Exception) -> UserError:
        return UserError(
            f"image file {self.path(index)} (image id {self.ids[index]}) cannot be read: {error}; "
            "replace it or take it out of the annotation file"
        )
