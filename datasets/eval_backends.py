"""The packages that compute COCO's numbers, behind one interface: pycocotools, faster-coco-eval, hotcoco.

A new one is a subclass of `Backend` in the table `BACKENDS`, whose order says which of them `auto` prefers.
"""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from util.errors import UserError

MAX_DETECTIONS = [1, 10, 100]  # the standard; more detections per image are saved but do not enter these numbers
STATS = 12
COLUMNS = 6  # of a row of results: x, y, width, height in pixels of the file, score, category id
NOTHING = np.empty((0, COLUMNS))

Results = Mapping[int, np.ndarray]  # image id -> (n, 6) float64 rows; the best first


@dataclass
class Evaluated:
    """What COCOeval computed; T IoU thresholds, R recall steps, K categories, A areas, M detection limits."""

    stats: list[float]  # the 12 numbers
    category_ids: list[int]  # of the K axis
    precision: np.ndarray  # (T, R, K, A, M), -1 where there is no object
    recall: np.ndarray  # (T, K, A, M)
    scores: np.ndarray  # (T, R, K, A, M) score at which that recall is reached


class Backend(ABC):
    """The ground truth in the form that one package wants, converted once, and the package.

    Args:
        truth: annotations as `datasets.annotations.mend_coco` leaves them.
        image_ids: the images that are evaluated, all of them: one without results has missed its objects.

    Raises:
        ImportError: the package is not installed, or too old.
    """

    requirement: str  # what pip installs

    def __init__(self, truth: COCO, image_ids: Iterable[int]) -> None:
        # Two of the packages hold image ids as floats, which are not exact above 2^53: places in the order of the ids
        # stand for them.
        self.places = {image_id: place for place, image_id in enumerate(sorted(image_ids))}
        self.categories = [{"id": i, "name": category["name"]} for i, category in truth.cats.items()]
        self.objects = {i: _lean(truth.imgToAnns.get(i, []), place) for i, place in self.places.items()}

    @staticmethod
    @abstractmethod
    def load() -> tuple[Any, Any]:
        """Import the package and return the two classes that are used of it."""

    @abstractmethod
    def add(self, results: Results) -> None:
        """Do now what can be done before the last image is here. Results of an image that came before replace them."""

    @abstractmethod
    def evaluate(self, results: Results) -> Evaluated:
        """Evaluate all results, whether they were added before or not."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what was added."""


class Pycocotools(Backend):
    """The reference. All of its work comes after the last image."""

    requirement = "pycocotools"

    def __init__(self, truth: COCO, image_ids: Iterable[int]) -> None:
        super().__init__(truth, image_ids)
        annotations = [entry for entries in self.objects.values() for entry in entries]
        self._truth = self._indexed(annotations)

    @staticmethod
    def load() -> tuple[Any, Any]:
        return COCO, COCOeval

    def add(self, results: Results) -> None:
        """Nothing: `loadRes` wants all results in one call."""

    def reset(self) -> None:
        """Nothing was added."""

    def evaluate(self, results: Results) -> Evaluated:
        entries = as_entries({self.places[image_id]: rows for image_id, rows in results.items()})
        with _silence():
            # Without any result `loadRes` is an IndexError in pycocotools.
            found = self._truth.loadRes(entries) if entries else self._indexed([])
            evaluation = self.load()[1](self._truth, found, iouType="bbox")
            evaluation.params.imgIds = list(self.places.values())
            evaluation.params.maxDets = MAX_DETECTIONS
            evaluation.evaluate()
        return _finish(evaluation)

    def _indexed(self, annotations: list[dict]) -> Any:
        """Return the package's object of these annotations, of the images and categories of the truth."""
        made = self.load()[0]()
        images = [{"id": place} for place in self.places.values()]
        made.dataset = {"images": images, "categories": self.categories, "annotations": annotations}
        with _silence():
            made.createIndex()
        return made


class FasterCocoEval(Pycocotools):
    """The same classes with the loops in C++."""

    requirement = "faster-coco-eval>=1.6"

    @staticmethod
    def load() -> tuple[Any, Any]:
        from faster_coco_eval import COCO as Truth
        from faster_coco_eval import COCOeval_faster as Evaluation

        return Truth, Evaluation


class HotCoco(Backend):
    """Matches the detections of a batch as they arrive; curves are all that is left for the end."""

    requirement = "hotcoco>=1.3,<2"

    def __init__(self, truth: COCO, image_ids: Iterable[int]) -> None:
        super().__init__(truth, image_ids)
        self.reset()

    @staticmethod
    def load() -> tuple[Any, Any]:
        from hotcoco import Params, StreamingEval  # the latter came with 1.3

        return StreamingEval, Params

    def reset(self) -> None:
        stream_class, params_class = self.load()
        params = params_class("bbox")
        params.max_dets = MAX_DETECTIONS
        self._stream = stream_class(self.categories, "bbox", params=params)
        self._matched: dict[int, np.ndarray] = {}

    def add(self, results: Results) -> None:
        if not results:
            return
        places = [self.places[image_id] for image_id in results]
        rows = np.empty((sum(map(len, results.values())), 1 + COLUMNS))
        rows[:, 0] = np.repeat(places, [len(own) for own in results.values()])
        np.concatenate(list(results.values()), out=rows[:, 1:])
        objects = [entry for image_id in results for entry in self.objects[image_id]]
        self._stream.update([{"id": place} for place in places], objects, rows)
        self._matched.update(results)

    def evaluate(self, results: Results) -> Evaluated:
        # What is left: images without results, those of other processes, and all of them after an evaluation, which
        # uses the stream up.
        wanted = {image_id: results.get(image_id, NOTHING) for image_id in self.places}
        self.add({i: rows for i, rows in wanted.items() if self._matched.get(i) is not rows})
        stream = self._stream
        self.reset()
        return _finish(stream.finalize())


BACKENDS: dict[str, type[Backend]] = {  # the values of --evaluator, the fastest first
    "hotcoco": HotCoco,
    "faster-coco-eval": FasterCocoEval,
    "pycocotools": Pycocotools,
}


def find_backend(name: str) -> type[Backend]:
    """Return the class of a package; of the fastest one that is installed for `auto`.

    Raises:
        UserError: the package is not installed, or too old; says how to get it.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"evaluator {name!r}: use auto, {', '.join(BACKENDS)}")
    for backend in BACKENDS.values() if name == "auto" else [BACKENDS[name]]:
        try:
            backend.load()
        except ImportError as error:
            reason = error
        else:
            return backend
    raise UserError(
        f'--evaluator {name}: run `pip install "{backend.requirement}"` ({reason}), or use --evaluator pycocotools, '
        "whose numbers are the same"
    )


def as_entries(results: Results) -> list[dict]:
    """Return the results as a COCO results list, images in ascending order of their id."""
    return [
        {"image_id": image_id, "category_id": int(category), "bbox": box, "score": score}
        for image_id in sorted(results)
        for *box, score, category in results[image_id].tolist()
    ]


def _lean(annotations: Iterable[dict], place: int) -> list[dict]:
    """Return what the evaluation of boxes needs of the objects of an image: masks would be converted in every epoch."""
    kept = ("id", "category_id", "bbox", "area", "iscrowd")
    return [{"image_id": place, **{key: entry[key] for key in kept}} for entry in annotations]


def _finish(evaluation: Any) -> Evaluated:
    """Return the numbers of a COCOeval, of whatever package, that has matched all images."""
    with _silence():
        evaluation.accumulate()
        evaluation.summarize()
    arrays = evaluation.eval  # once: hotcoco makes new ones at every look
    return Evaluated(
        stats=[float(value) for value in evaluation.stats[:STATS]],
        category_ids=[int(i) for i in evaluation.params.catIds],
        **{key: np.asarray(arrays[key]) for key in ("precision", "recall", "scores")},
    )


def _silence() -> contextlib.AbstractContextManager:
    """Swallow what the packages print about their progress."""
    return contextlib.redirect_stdout(io.StringIO())
