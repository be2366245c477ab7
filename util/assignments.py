"""Which queries learn which objects of a few images, kept after every evaluation: `--plot_assignment N`.

The images go through the detector as in training, with the queries of every training scheme, and the assigners of the
criterion say who learns what on every layer. `OUTPUT_DIR/assignment/image_ID/epoch_NNNN.npz` (epochs from 0, as in the
names of checkpoints) holds the fields of `Pairs`, for own pictures too:

    pairs = read_pairs(Path("exps/a/assignment/image_7"))[-1]
    chosen = pairs.of("one2many", layer=6)  # layers from 1, as in the picture
    pairs.query[chosen], pairs.object[chosen]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from datasets.collate import collate
from models.criterion import Criterion, Taught
from models.detector import Detector
from util import dist
from util.boxes import cxcywh_to_xyxy, pairwise_iou
from util.correspondence import telling_images, write_arrays
from util.errors import UserError
from util.rng import isolated_rng, seed_everything
from util.structures import Assignment, DetectorOutput, Target


@dataclass(frozen=True)
class Pairs:
    """All pairs of queries and objects of an image: M objects, G groups of queries, P pairs.

    Boxes are cxcywh relative to the image.
    """

    epoch: int  # from 0
    image_id: int
    labels: np.ndarray  # (M,) class indices of the model
    boxes: np.ndarray  # (M, 4) of the objects
    groups: np.ndarray  # (G,) names of the sets: one2one, one2many, dn, co_HEAD; encoder: the proposals
    queries: np.ndarray  # (G,) how many queries each has
    depth: np.ndarray  # (G,) how many layers each has
    ready: np.ndarray  # (G,) bool, pairs are known beforehand: nobody matches
    group: np.ndarray  # (P,) index into `groups`
    layer: np.ndarray  # (P,) from 1
    query: np.ndarray  # (P,) number in the group, from 0; the token of a proposal
    object: np.ndarray  # (P,) from 0
    weight: np.ndarray  # (P,) of the pair, 1 where they all count the same
    score: np.ndarray  # (P,) of the object's class
    box: np.ndarray  # (P, 4) what the query predicts on this layer
    iou: np.ndarray  # (P,) of that with the object

    def of(self, name: str, layer: int) -> np.ndarray:
        """Return the indices of the pairs of a group on a layer, from 1."""
        return np.flatnonzero((self.groups[self.group] == name) & (self.layer == layer))

    def changed(self, name: str, layer: int) -> int:
        """Return how many objects have other queries on a layer than on the one before it."""
        before, now = ({*zip(self.object[i], self.query[i])} for i in (self.of(name, layer - 1), self.of(name, layer)))
        return len({int(pair[0]) for pair in before ^ now})


class Assignments:
    """Looks at which queries learn which objects of some images.

    Nothing of the training changes: modes are put back, batch norm keeps its statistics, dropout is off, and random
    numbers (of denoising) come from a seed of the image, so that pictures of different epochs have the same noise.

    Args:
        criterion: its assigners decide.
        dataset: the evaluated images, a `datasets.base.DetectionDataset`.
        images: so many are drawn: the first with two objects or more, then those with one.
    """

    flag = "--plot_assignment"  # for messages

    def __init__(self, criterion: Criterion, dataset: Any, images: int) -> None:
        self.criterion, self.dataset = criterion, dataset
        self.image_ids = telling_images(dataset, images)

    @torch.no_grad()
    def look(self, model: Detector, epoch: int, device: torch.device) -> list[Pairs]:
        """Return the pairs of all images at the end of `epoch`, from 0.

        Every process does all images: auxiliary heads average over processes, so that all have to take part.
        """
        found = []
        # The last moment of the epoch: schedules by epoch and those by the exact time agree.
        time = math.nextafter(epoch + 1.0, 0.0)
        with isolated_rng(), as_in_training(model, self.criterion):
            for image_id in self.image_ids:
                index = self.dataset.image_ids.index(image_id)
                images, targets = collate([self.dataset[index]])
                if not len(targets[0]):
                    continue  # nothing of its objects is left at this size
                targets = [t.to(device) for t in targets]
                seed_everything(image_id)
                output = model(images.to(device), targets, epoch)
                found.append(pairs_of(output, targets[0], self.criterion.pairs(output, targets, time), epoch))
        return found

    def finish(
        self, model: Detector, epoch: int, folder: Path, device: torch.device, autocast: AbstractContextManager
    ) -> list[Path]:
        """Store the pairs of this evaluation in `folder` and draw them; a collective.

        Only the main process writes. What cannot be found, written or drawn (no matplotlib, a full disk) is told and
        left out: the training goes on.

        Returns:
            the pictures.
        """
        try:
            with autocast:
                found = self.look(model, epoch, device)
        except Exception as error:  # any: a picture is not worth a training
            if dist.is_distributed():
                raise  # the other processes wait in a collective that this one has left
            return self._give_up(error)
        if not dist.is_main():
            return []
        try:
            for pairs in found:
                path = folder / f"image_{pairs.image_id}" / f"epoch_{pairs.epoch:04}.npz"
                write_arrays(asdict(pairs), path, self.flag)
            with isolated_rng():
                return [self._draw(pairs, folder) for pairs in found]
        except Exception as error:  # any: an error on this process alone would leave the others waiting for it
            return self._give_up(error)

    @staticmethod
    def _give_up(error: Exception) -> list[Path]:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        dist.info(f"no pictures of assignments: {kind}{error}")
        return []

    def _draw(self, pairs: Pairs, folder: Path) -> Path:
        from util.assignment_plot import draw_assignment

        image = self.dataset.load_image(self.dataset.image_ids.index(pairs.image_id)).convert("RGB")
        names = [self.dataset.class_names[label] for label in pairs.labels]
        return draw_assignment(pairs, image, names, folder / f"image_{pairs.image_id}.png")


@contextmanager
def as_in_training(model: Detector, criterion: Criterion) -> Iterator[None]:
    """Make every training scheme alive, without dropout and without new statistics; modes are put back at the end."""
    modules = [*model.modules(), *criterion.modules()]
    modes = [module.training for module in modules]
    try:
        model.eval()
        criterion.eval()
        model.groups.train()
        for module in model.groups.modules():
            if isinstance(module, (nn.Dropout, _BatchNorm)):
                module.eval()
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode


def pairs_of(output: DetectorOutput, target: Target, taught: Sequence[Taught], epoch: int) -> Pairs:
    """Return the pairs of the only image of a batch.

    Args:
        output: of the detector.
        target: the objects of the image.
        taught: the pairs of its supervisions. Pairs of weight 0 are none.
        epoch: from 0.
    """
    names = list(dict.fromkeys(entry.name for entry in taught))
    sets = [output.sets[name].predictions for name in names]
    columns = [_columns(names.index(entry.name), entry, output, target) for entry in taught]
    fields = {key: torch.cat([own[key] for own in columns]).cpu().numpy() for key in columns[0]}
    empty = [0 if found.padding is None else int(found.padding[0].sum()) for found in sets]
    ready = {entry.name for entry in taught if isinstance(entry.supervision.assign, Assignment)}
    return Pairs(
        epoch=epoch,
        image_id=target.image_id,
        labels=target.labels.cpu().numpy(),
        boxes=target.boxes.float().cpu().numpy(),
        groups=np.array(names),
        queries=np.array([found.logits.shape[2] - none for found, none in zip(sets, empty)]),
        depth=np.array([found.layers for found in sets]),
        ready=np.array([name in ready for name in names]),
        **fields,
    )


def _columns(group: int, taught: Taught, output: DetectorOutput, target: Target) -> dict[str, Tensor]:
    """Return the fields of `Pairs` that have a row for each pair, of one supervision."""
    own, predictions = taught.assignment, output.sets[taught.name].predictions
    weight = torch.ones_like(own.slot, dtype=torch.float32) if own.weight is None else own.weight.float()
    real = weight > 0
    layer, query, wanted = own.layer[real], own.slot[real], own.target[real]
    label = torch.zeros_like(wanted) if taught.supervision.class_agnostic else target.labels[wanted]
    box = predictions.boxes[layer, 0, query].float()
    corners = cxcywh_to_xyxy(box), cxcywh_to_xyxy(target.boxes[wanted].float())
    return {
        "group": torch.full_like(layer, group),
        "layer": layer + 1,
        "query": query,
        "object": wanted,
        "weight": weight[real],
        "score": predictions.logits[layer, 0, query, label].float().sigmoid(),
        "box": box,
        "iou": pairwise_iou(*corners).diagonal(),
    }


def read_pairs(folder: Path) -> list[Pairs]:
    """Return what was stored in the folder of an image, by epoch."""
    found = []
    for path in Path(folder).glob("epoch_*.npz"):
        with np.load(path) as content:
            fields = {name: content[name] for name in content.files}
        found.append(Pairs(**fields | {name: int(fields[name]) for name in ("epoch", "image_id")}))
    return sorted(found, key=lambda pairs: pairs.epoch)
