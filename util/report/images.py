"""The best and the worst images of an evaluation, truth beside detections, inside the page."""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.confusion import image_scores
from util.errors import UserError
from util.report.facts import Evaluated
from util.report.html import Html, el, note, section
from util.structures import Detections
from util.visualize import draw_detections

WIDEST = 1400  # pixels of a picture in the page
QUALITY = 88  # of its JPEG


def images(found: Evaluated, count: int) -> Html:
    """Return the section of `count` worst and `count` best images by F1 at the threshold of the confusion matrix."""
    threshold = found.curves.confusion.threshold
    f1, objects, mistakes = image_scores(found.curves.matches, threshold, len(found.dataset))
    busy = np.flatnonzero(objects + mistakes > 0)  # an image without anything is no example
    worst = busy[np.lexsort((-mistakes[busy], f1[busy]))][:count]
    rest = busy[~np.isin(busy, worst)]
    best = rest[np.lexsort((-objects[rest], -f1[rest]))][:count]
    parts: list[Html] = []
    try:
        for title, chosen in (("Worst", worst), ("Best", best)):
            if len(chosen):
                captions = [_caption(i, found, f1, objects, mistakes) for i in chosen.tolist()]
                parts += [el("h3", title), _figures(found, chosen.tolist(), captions, threshold)]
    except UserError as error:  # a file is gone or was changed since the evaluation
        parts.append(note(f"Images are missing here: {error}"))
    hint = (
        f"Truth left, detections with a score of at least {threshold:g} right. Sorted by the F1 of the image at IoU "
        "0.5; a mistake is a missed object or a wrong detection. A click enlarges."
    )
    return section("Images", "images", el("p", hint, class_="hint"), *(parts or [note("No image has an object.")]))


def _caption(index: int, found: Evaluated, f1: np.ndarray, objects: np.ndarray, mistakes: np.ndarray) -> str:
    image_id = found.dataset.image_ids[index]
    return f"image {image_id}: F1 {f1[index]:.2f}, {objects[index]} objects, {mistakes[index]} mistakes"


def _figures(found: Evaluated, chosen: list[int], captions: list[str], threshold: float) -> Html:
    ids = [found.dataset.image_ids[index] for index in chosen]
    own = [_detections(found, image_id) for image_id in ids]
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_detections(found.dataset, own, Path(folder), limit=len(own), score_threshold=threshold)
        sources = [_data_uri(path) for path in paths[: len(own)]]
    figures = [
        el("figure", el("figcaption", text), el("img", src=source, alt=text), tabindex=0)
        for text, source in zip(captions, sources)
    ]
    return el("div", *figures, class_="grid wide pictures")


def _detections(found: Evaluated, image_id: int) -> Detections:
    rows = torch.from_numpy(found.rows.get(image_id, np.zeros((0, 6))))  # float64, which holds every category id
    boxes = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], dim=1).float()
    labels = [found.dataset.category_ids.index(int(category)) for category in rows[:, 5].tolist()]
    return Detections(rows[:, 4].float(), torch.tensor(labels, dtype=torch.int64), boxes, image_id)


def _data_uri(path: Path) -> str:
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    picture.thumbnail((WIDEST, WIDEST))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
