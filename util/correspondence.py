"""Learned correspondences of a few images, kept after every evaluation: `--plot_correspondence N`.

They show over a training whether every object finds a query of its own, whether all objects end up at the same one, and
whether the choice is the optimal one. `OUTPUT_DIR/correspondence/image_ID/epoch_NNNN.npz` (epochs from 0, as in the
names of checkpoints) holds the fields of `Snapshot`, for own pictures too:

    snapshot = read_snapshots(Path("exps/a/correspondence/image_7"))[-1]
    snapshot.c[-1]  # objects x queries on the last decoder layer
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.assign import Request, SoftMatcher
from models.assign.hungarian import UNMATCHABLE, match
from models.criterion import Criterion
from util import dist
from util.errors import UserError
from util.rng import isolated_rng
from util.structures import Assignment, DetectorOutput, FlatTargets, Target

FAINT = 1e-4  # weaker correspondences are stored as 0: they would be most of the file


@dataclass(frozen=True)
class Snapshot:
    """Correspondences of the M objects of an image with N queries after one epoch, on L decoder layers."""

    epoch: int  # from 0
    image_id: int
    layers: np.ndarray  # (L,) numbers of the decoder layers, ascending
    labels: np.ndarray  # (M,) class indices of the model
    boxes: np.ndarray  # (M, 4) cxcywh in [0, 1]
    c: np.ndarray  # (L, M, N) float16, dense correspondence C, 0 below FAINT
    s: np.ndarray  # (L, M, N) float16, weights S of the chosen pairs, 0 elsewhere
    optimal: np.ndarray  # (L, M) query of each object in the cheapest one-to-one matching of the same costs, -1: none

    def chosen(self) -> np.ndarray:
        """Return the query of the largest weight of each object on the last layer, (M,), -1 where there is none."""
        return np.where(self.s[-1].max(1) > 0, self.s[-1].argmax(1), -1)

    def distinct(self) -> float:
        """Return chosen queries per object on the last layer, each query counted once."""
        return float((self.s[-1] > 0).any(0).sum() / len(self.labels))

    def agree(self) -> float:
        """Return the share of objects whose strongest query is that of the cheapest matching."""
        chosen = self.chosen()
        return float(((chosen == self.optimal[-1]) & (chosen >= 0)).mean())


class Correspondences:
    """Looks at what a learned matcher makes of some images while they are evaluated.

    The matcher is asked as at the end of its schedules, without the help of a warm-up: one sees what the probe itself
    knows, as the measures `test_*` do. Nothing of the training changes.

    Args:
        criterion: a `SoftMatcher` is its assigner of decoder queries.
        dataset: the evaluated images, a `datasets.base.DetectionDataset`.
        images: so many images are watched: the first of the data set with two objects or more, as one object alone
            cannot collapse onto the query of another; then those with one.
    """

    flag = "--plot_correspondence"  # for messages

    def __init__(self, criterion: Criterion, dataset: Any, images: int) -> None:
        self.criterion, self.dataset = criterion, dataset
        self.image_ids = telling_images(dataset, images)
        self._seen: dict[int, dict[str, Any]] = {}

    @torch.no_grad()
    def see(self, output: DetectorOutput, targets: Sequence[Target]) -> None:
        """Note the watched images of a batch; it costs nothing if there are none."""
        watched = [(i, t) for i, t in enumerate(targets) if t.image_id in self.image_ids and len(t)]
        if not watched:
            return
        self.criterion.eval()
        with torch.autocast(output.pred_logits.device.type, enabled=False):
            layers = sorted(self._layers(output, targets), key=lambda layer: layer[0])
        numbers, *dense = zip(*layers)
        c, s, costs = (torch.stack(maps, 1).float().cpu() for maps in dense)  # (B, L, M, N)
        for i, target in watched:
            size = len(target)
            self._seen[target.image_id] = {
                "layers": np.array(numbers),
                "labels": target.labels.cpu().numpy(),
                "boxes": target.boxes.float().cpu().numpy(),
                "c": torch.where(c[i, :, :size] < FAINT, 0.0, c[i, :, :size]).half().numpy(),
                "s": s[i, :, :size].half().numpy(),
                "optimal": np.stack([_optimal(layer) for layer in costs[i, :, :size]]),
            }

    def _layers(
        self, output: DetectorOutput, targets: Sequence[Target]
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield number, C, S and costs, (B, M, N) each, of every layer of the queries of inference that is taught."""
        supervised = output.sets["one2one"]
        predictions, count = supervised.predictions, supervised.predictions.layers
        for supervision in supervised.supervision:
            layers = range(count) if supervision.layers is None else supervision.layers
            layers = [layer for layer in layers if self.criterion.aux_loss or layer == count - 1]
            if isinstance(supervision.assign, Assignment) or not layers:
                continue
            matcher: SoftMatcher = self.criterion.assigners[supervision.assign]
            request = Request("one2one", predictions, FlatTargets.of(targets), supervision, layers)
            found = matcher.correspond(request)
            matcher.choose(found)
            costs = matcher.matching_costs(found)
            maps = (x.unflatten(0, (len(layers), -1)) for x in (found.c, found.weights, costs))
            yield from zip(layers, *maps)

    def take(self, epoch: int) -> list[Snapshot]:
        """Return what all processes saw since the last call, in the order of `image_ids`; a collective."""
        parts, self._seen = dist.gather_objects(self._seen), {}
        seen = {image_id: fields for part in parts for image_id, fields in part.items()}
        return [Snapshot(epoch, i, **seen[i]) for i in self.image_ids if i in seen]

    def finish(self, epoch: int, folder: Path) -> list[Path]:
        """Store what was seen in this evaluation in `folder` and draw each image over all epochs so far; a collective.

        Only the main process writes. What cannot be written, read or drawn (no matplotlib, a full disk, a damaged file)
        is told and left out: the training goes on.

        Returns:
            the pictures.
        """
        snapshots = self.take(epoch)
        if not dist.is_main():
            return []
        try:
            for snapshot in snapshots:
                write_snapshot(snapshot, folder / f"image_{snapshot.image_id}")
            with isolated_rng():
                return [self._draw(snapshot, folder) for snapshot in snapshots]
        except Exception as error:  # any: an error on this process alone would leave the others waiting for it
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            dist.info(f"no pictures of correspondences: {kind}{error}")
            return []

    def _draw(self, snapshot: Snapshot, folder: Path) -> Path:
        """Draw the image of `snapshot` with all that is stored of it."""
        from util.correspondence_plot import draw_correspondence

        own = folder / f"image_{snapshot.image_id}"
        # A run that went back to an earlier epoch has files of later ones, of its former life.
        history = [old for old in read_snapshots(own) if old.epoch <= snapshot.epoch and _same_image(old, snapshot)]
        image = self.dataset.load_image(self.dataset.image_ids.index(snapshot.image_id)).convert("RGB")
        names = [self.dataset.class_names[label] for label in snapshot.labels]
        return draw_correspondence(history, image, names, own.with_suffix(".png"))


def telling_images(dataset: Any, images: int) -> list[int]:
    """Return the ids of the first images with two objects or more, then of those with one; `images` at most."""
    annotated = dataset.coco.imgToAnns
    objects = {i: sum(not entry["iscrowd"] for entry in annotated[i]) for i in dataset.image_ids}
    return sorted((i for i in objects if objects[i]), key=lambda i: objects[i] < 2)[:images]


def write_snapshot(snapshot: Snapshot, folder: Path) -> Path:
    """Write `epoch_NNNN.npz` into `folder`, which is made; an older file is replaced in one step, never half.

    Raises:
        UserError: it cannot be written.
    """
    path = folder / f"epoch_{snapshot.epoch:04}.npz"
    write_arrays(asdict(snapshot), path, "--plot_correspondence")
    return path


def write_arrays(arrays: Mapping[str, Any], path: Path, flag: str) -> None:
    """Write an .npz file, and its folder, in one step; `flag` is named in the error.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{flag}: cannot write {path}: {error}. Is the disk full?") from error


def read_snapshots(folder: Path) -> list[Snapshot]:
    """Return what `write_snapshot` wrote into the folder of an image, by epoch."""
    snapshots = []
    for path in Path(folder).glob("epoch_*.npz"):
        with np.load(path) as content:
            fields = {name: content[name] for name in content.files}
        snapshots.append(Snapshot(**fields | {name: int(fields[name]) for name in ("epoch", "image_id")}))
    return sorted(snapshots, key=lambda snapshot: snapshot.epoch)


def _optimal(costs: Tensor) -> np.ndarray:
    """Return the slot of each target in the cheapest one-to-one matching, (M,), -1 where slots are too few."""
    finite = costs.nan_to_num(UNMATCHABLE, UNMATCHABLE, -UNMATCHABLE).numpy()
    found = np.full(len(finite), -1)
    slots, targets = match(finite)
    found[targets] = slots
    return found


def _same_image(old: Snapshot, new: Snapshot) -> bool:
    """Say whether both are of the same objects: other data may have the same ids."""
    return np.array_equal(old.labels, new.labels) and np.allclose(old.boxes, new.boxes, atol=1e-3)
