"""From what the detector says to one number: assign, count, evaluate the terms, weigh, add.

Encoder proposals, decoder layers, one-to-many and ready-made pairs take the same path; a scheme differs only in its
`Supervision`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.assign import Assigner, Request
from models.losses import LossTerm, cardinality_error, class_error
from util.structures import (
    Assignment,
    DetectorOutput,
    LossReport,
    Predictions,
    Supervision,
    Target,
    TargetPairs,
)


def loss_name(term: str, set_name: str, layer: int, layers: int) -> str:
    """Return the key under which the family's logs know a number.

    `loss_ce` (last layer), `loss_ce_0` (layer 0), `loss_ce_enc`, `loss_ce_one2many`, `loss_ce_0_one2many`, ...
    """
    if set_name == "encoder":
        return f"{term}_enc"
    suffix = "" if layer == layers - 1 else f"_{layer}"
    return f"{term}{suffix}" if set_name == "one2one" else f"{term}{suffix}_{set_name}"


@dataclass
class _Job:
    """One supervision of one set."""

    name: str
    predictions: Predictions  # of the supervised layers
    layers: list[int]  # their numbers
    last: int  # number of layers of the whole set
    targets: list[Target]
    supervision: Supervision
    assignment: Assignment | None = None


class Criterion(nn.Module):
    """Losses of all sets.

    Args:
        assigners: by the names that supervisions use; modules with parameters are registered.
        terms: loss terms by the names that supervisions use; each returns sums per layer.
        weights: weight in the total of every loss that the terms return (`loss_ce`, ...).
        aux_loss: also supervise the layers before the last one.
    """

    def __init__(
        self,
        *,
        assigners: Mapping[str, Assigner],
        terms: Mapping[str, LossTerm],
        weights: Mapping[str, float],
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        self.assigners = dict(assigners)
        self.learned = nn.ModuleDict({n: a for n, a in assigners.items() if isinstance(a, nn.Module)})
        self.terms = dict(terms)
        self.weights = dict(weights)
        self.aux_loss = aux_loss

    def forward(self, output: DetectorOutput, targets: list[Target]) -> LossReport:
        """Return the weighted total and every entry of the log.

        Args:
            output: of the detector for B images.
            targets: their objects, on the same device. With several processes the normalisers are averaged over them:
                one all-reduce of all counts.
        """
        jobs = self._jobs(output, targets)
        self._assign(jobs)
        # Not in evaluation: processes may have different numbers of batches there.
        counts = _average_counts([j.assignment.count for j in jobs], output.pred_logits.device, over_all=self.training)
        values: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for job, count in zip(jobs, counts):
            self._evaluate(job, count, values, weights)
        for name, loss in output.aux_losses.items():
            _add(values, weights, name, loss, 1.0)
        total = sum(weights[name] * value for name, value in values.items() if name in weights)
        total = total + self._untrained(output, jobs)
        return LossReport(total, {name: value.detach() for name, value in values.items()}, weights)

    def _jobs(self, output: DetectorOutput, targets: list[Target]) -> list[_Job]:
        agnostic = [replace(t, labels=torch.zeros_like(t.labels)) for t in targets]
        jobs = []
        for name, supervised in output.sets.items():
            count = supervised.predictions.layers
            for supervision in supervised.supervision:
                layers = list(range(count) if supervision.layers is None else supervision.layers)
                if not self.aux_loss:
                    layers = [layer for layer in layers if layer == count - 1]
                if layers:
                    chosen = supervised.predictions.select_layers(layers)
                    taught = agnostic if supervision.class_agnostic else targets
                    jobs.append(_Job(name, chosen, layers, count, taught, supervision))
        return jobs

    def _assign(self, jobs: list[_Job]) -> None:
        """Give every job its pairs; each assigner is called once for all the sets that name it."""
        waiting: dict[str, list[_Job]] = {}
        for job in jobs:
            if isinstance(job.supervision.assign, Assignment):
                ready = job.supervision.assign
                job.assignment = ready if self.aux_loss else _of_last_layer(ready, job)
            else:
                waiting.setdefault(job.supervision.assign, []).append(job)
        for name, group in waiting.items():
            requests = [Request(j.name, j.predictions, j.targets, j.supervision) for j in group]
            for job, assignment in zip(group, self.assigners[name](requests)):
                job.assignment = assignment

    def _evaluate(self, job: _Job, count: float | Tensor, values: dict[str, Tensor], weights: dict[str, float]) -> None:
        """Add the losses of one job to `values`, scaled by the weight of its supervision (log-only entries too)."""
        scale = job.supervision.weight
        pairs = _gather(job.targets, job.assignment)
        for term in job.supervision.terms:
            for loss, per_layer in self.terms[term](job.predictions, pairs, job.assignment).items():
                for layer, value in zip(job.layers, per_layer):
                    name = loss_name(loss, job.name, layer, job.last)
                    _add(values, weights, name, scale * value / count, self.weights[loss])
        for loss, value in job.assignment.losses.items():
            _add(values, weights, loss_name(loss, job.name, job.last - 1, job.last), scale * value, 1.0)
        self._log(job, pairs, values)

    @staticmethod
    def _log(job: _Job, pairs: TargetPairs, values: dict[str, Tensor]) -> None:
        """Add the entries that are only logged."""
        scale, logits = job.supervision.weight, job.predictions.logits.detach()
        if job.layers[-1] == job.last - 1 and not job.supervision.class_agnostic:
            error = class_error(logits, pairs, job.assignment, len(job.layers) - 1)
            values[loss_name("class_error", job.name, job.last - 1, job.last)] = scale * error
        objects = torch.tensor([len(t) * job.supervision.repeat for t in job.targets])
        errors = cardinality_error(logits, objects.to(logits.device, non_blocking=True))
        for layer, error in zip(job.layers, errors):
            values[loss_name("cardinality_error", job.name, layer, job.last)] = scale * error

    @staticmethod
    def _untrained(output: DetectorOutput, jobs: list[_Job]) -> Tensor | float:
        """Return 0 with a graph to layers that nothing supervises, so that every parameter gets a gradient (DDP)."""
        taught: dict[str, set[int]] = {}
        for job in jobs:
            taught.setdefault(job.name, set()).update(job.layers)
        nothing: Tensor | float = 0.0
        for name, supervised in output.sets.items():
            rest = [i for i in range(supervised.predictions.layers) if i not in taught.get(name, ())]
            if rest:
                chosen = supervised.predictions.select_layers(rest)
                nothing = nothing + 0.0 * (chosen.logits.sum() + chosen.boxes.sum())
        return nothing


def _add(values: dict[str, Tensor], weights: dict[str, float], name: str, value: Tensor, weight: float) -> None:
    values[name] = values[name] + value if name in values else value
    weights[name] = weight


def _of_last_layer(assignment: Assignment, job: _Job) -> Assignment:
    """Return the ready-made pairs of the last layer, the only one supervised without auxiliary losses, as layer 0."""
    last = (job.last if job.supervision.layers is None else len(job.supervision.layers)) - 1
    here = assignment.layer == last
    return replace(
        assignment,
        layer=torch.zeros_like(assignment.layer[here]),
        image=assignment.image[here],
        slot=assignment.slot[here],
        target=assignment.target[here],
        weight=None if assignment.weight is None else assignment.weight[here],
        ignore=None if assignment.ignore is None else assignment.ignore[last:],
    )


def _gather(targets: list[Target], assignment: Assignment) -> TargetPairs:
    """Return the target of every pair."""
    labels, boxes = torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets])
    starts = torch.tensor([0, *(len(t) for t in targets)]).cumsum(0)[:-1].to(labels.device, non_blocking=True)
    index = starts[assignment.image] + assignment.target
    return TargetPairs(labels[index], boxes[index].float())


def _average_counts(counts: list[float | Tensor], device: torch.device, *, over_all: bool) -> Tensor | list[float]:
    """Return each count, at least 1, averaged over processes if `over_all`: one all-reduce for the whole step."""
    if not (over_all and dist.is_available() and dist.is_initialized()):
        return [c.clamp(min=1) if isinstance(c, Tensor) else max(c, 1.0) for c in counts]
    # The plain numbers travel in one copy that does not wait for the device.
    vector = torch.tensor([0.0 if isinstance(c, Tensor) else c for c in counts]).to(device, non_blocking=True)
    for i, count in enumerate(counts):
        if isinstance(count, Tensor):
            vector[i] = count.detach()
    dist.all_reduce(vector)
    return (vector / dist.get_world_size()).clamp(min=1)
