"""From what the detector says to one number: assign, count, evaluate the terms, weigh, add.

Encoder proposals, decoder layers, one-to-many and ready-made pairs take the same path; a scheme differs only in its
`Supervision`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.assign import Assigner, Request
from models.assign.dense import PaddedTargets
from models.assign.health import chosen_slots, duplicates
from models.losses import LossTerm, cardinality_error, class_error
from ops.transfer import send
from util.structures import (
    Assignment,
    DetectorOutput,
    FlatTargets,
    LossReport,
    Predictions,
    Role,
    SupervisedSet,
    Supervision,
    Target,
    TargetPairs,
)


def loss_name(term: str, set_name: str, layer: int, last: int) -> str:
    """Return the key under which the family's logs know a number.

    `loss_ce` (last layer), `loss_ce_0` (layer 0), `loss_ce_enc`, `loss_ce_NAME`, `loss_ce_0_NAME` of the set NAME,
    `loss_ce_enc_NAME` of the set `encoder_NAME`.
    """
    if set_name == "encoder" or set_name.startswith("encoder_"):
        return f"{term}_enc{set_name.removeprefix('encoder')}"
    suffix = "" if layer == last else f"_{layer}"
    return f"{term}{suffix}" if set_name == "one2one" else f"{term}{suffix}_{set_name}"


@dataclass
class Taught:
    """The pairs of one supervision of one set."""

    name: str  # of the set
    supervision: Supervision
    layers: list[int]  # the taught ones
    # Unlike elsewhere, `layer` is the number of the layer in the decoder; slots count in the set.
    assignment: Assignment


@dataclass
class _Job:
    """One supervision of one set."""

    name: str
    supervised: SupervisedSet
    supervision: Supervision
    layers: list[int]  # the supervised ones
    targets: FlatTargets
    assignment: Assignment | None = None  # counted in the stack of its batch

    @property
    def last(self) -> int:
        """Number of the last layer of the set, supervised or not."""
        return self.supervised.predictions.layers - 1

    @property
    def slots(self) -> slice:
        start = self.supervised.start
        return slice(start, start + self.supervised.predictions.logits.shape[2])

    @property
    def decides(self) -> bool:
        """Whether it gives the targets the queries that inference relies on, one each."""
        one_each = self.supervision.repeat == 1 and not self.supervision.class_agnostic
        return self.name == "one2one" and one_each and self.layers[-1] == self.last

    def overlaps(self, other: _Job) -> bool:
        """Whether both teach some slot on the same layer."""
        apart = self.slots.stop <= other.slots.start or other.slots.stop <= self.slots.start
        return not apart and not set(self.layers).isdisjoint(other.layers)


@dataclass
class _Batch:
    """Jobs on different parts of one stack, whose costs and losses are evaluated together."""

    jobs: list[_Job]
    layers: list[int] = field(default_factory=list)  # those that any of the jobs teaches
    predictions: Predictions | None = None  # the stack on these layers

    def takes(self, job: _Job) -> bool:
        first = self.jobs[0]
        same = job.supervised.stack is first.supervised.stack and job.supervision.terms == first.supervision.terms
        return same and not any(job.overlaps(other) for other in self.jobs)

    def close(self) -> None:
        """Fix the layers, once all jobs are known."""
        self.layers = sorted({layer for job in self.jobs for layer in job.layers})
        self.predictions = self.jobs[0].supervised.stack.select_layers(self.layers)

    def rows(self, job: _Job) -> list[int]:
        """Return where the layers of `job` are in `predictions`."""
        return [self.layers.index(layer) for layer in job.layers]


class Criterion(nn.Module):
    """Losses of all sets.

    Args:
        assigners: by the roles that supervisions name; one may have several roles. Modules are registered.
        terms: loss terms by the names that supervisions use; each returns sums per layer.
        weights: weight in the total of every loss that the terms return (`loss_ce`, ...).
        aux_loss: also supervise the layers before the last one.
    """

    def __init__(
        self,
        *,
        assigners: Mapping[Role, Assigner],
        terms: Mapping[str, LossTerm],
        weights: Mapping[str, float],
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        self.assigners = dict(assigners)
        modules = {id(a): (role, a) for role, a in reversed(assigners.items()) if isinstance(a, nn.Module)}
        self.learned = nn.ModuleDict(dict(modules.values()))  # each once, under the first of its roles
        self.terms = dict(terms)
        self.weights = dict(weights)
        self.aux_loss = aux_loss

    def forward(self, output: DetectorOutput, targets: list[Target], time: float | None = None) -> LossReport:
        """Return the weighted total and every entry of the log.

        Args:
            output: of the detector for B images.
            targets: their objects, on the same device. With several processes the normalisers are averaged over them:
                one all-reduce of all counts.
            time: epochs trained so far, with the finished share of the present one; schedules of assigners follow it.
                None: they are at their end.
        """
        batches = self._batches(output, targets)
        self._assign(batches, time)
        jobs = [job for batch in batches for job in batch.jobs]
        # Not in evaluation: processes may have different numbers of batches there.
        counts = _average_counts([j.assignment.count for j in jobs], output.pred_logits.device, over_all=self.training)
        counts = [count * job.assignment.factor for count, job in zip(counts, jobs)]
        values: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        remaining = iter(counts)
        for batch in batches:
            self._evaluate(batch, [next(remaining) for _ in batch.jobs], values, weights)
        for name, loss in output.aux_losses.items():
            _add(values, weights, name, loss, 1.0)
        values.update(output.aux_logs)
        total = sum(weights[name] * value for name, value in values.items() if name in weights)
        total = total + self._untrained(output, jobs)
        terms = {name: value.detach() for name, value in values.items()}
        return LossReport(total, terms, weights, None if self.training else _chosen(batches))

    @torch.no_grad()
    def pairs(self, output: DetectorOutput, targets: list[Target], time: float | None = None) -> list[Taught]:
        """Return which slots would learn which objects, as `forward` decides it, without any loss.

        Args:
            output, targets, time: as in `forward`.
        """
        batches = self._batches(output, targets)
        self._assign(batches, time)
        return [_taught(batch, job) for batch in batches for job in batch.jobs]

    def _batches(self, output: DetectorOutput, targets: list[Target]) -> list[_Batch]:
        """Return all supervisions, those of one stack together."""
        flat = FlatTargets.of(targets)
        agnostic = replace(flat, labels=torch.zeros_like(flat.labels))
        batches: list[_Batch] = []
        for name, supervised in output.sets.items():
            count = supervised.predictions.layers
            for supervision in supervised.supervision:
                layers = list(range(count) if supervision.layers is None else supervision.layers)
                if not self.aux_loss:
                    layers = [layer for layer in layers if layer == count - 1]
                if layers:
                    taught = agnostic if supervision.class_agnostic else flat
                    job = _Job(name, supervised, supervision, layers, taught)
                    batch = next((b for b in batches if b.takes(job)), None)
                    if batch is None:
                        batches.append(_Batch([job]))
                    else:
                        batch.jobs.append(job)
        for batch in batches:
            batch.close()
        return batches

    def _assign(self, batches: list[_Batch], time: float | None) -> None:
        """Give every job its pairs; each assigner is called once for all the sets that it serves."""
        waiting: dict[int, list[tuple[_Job, Request]]] = {}
        for batch in batches:
            for job in batch.jobs:
                if isinstance(job.supervision.assign, Assignment):
                    ready = job.supervision.assign
                    ready = ready if self.aux_loss else _of_last_layer(ready, job)
                    job.assignment = _in_stack(ready, batch, job)
                    continue
                rows = batch.rows(job)
                request = Request(
                    job.name, batch.predictions, job.targets, job.supervision, rows, job.slots, job.layers, time
                )
                waiting.setdefault(id(self.assigners[job.supervision.assign]), []).append((job, request))
        for entries in waiting.values():
            assigner = self.assigners[entries[0][0].supervision.assign]
            assignments = assigner([request for _, request in entries])
            for (job, _), assignment in zip(entries, assignments):
                job.assignment = assignment

    def _evaluate(
        self, batch: _Batch, counts: list[float | Tensor], values: dict[str, Tensor], weights: dict[str, float]
    ) -> None:
        """Add the losses of a batch to `values`, scaled by the weights of the supervisions (log-only entries too)."""
        pairs = [_gather(job.targets, job.assignment) for job in batch.jobs]
        together = _join(batch), TargetPairs(torch.cat([p.labels for p in pairs]), torch.cat([p.boxes for p in pairs]))
        for term in batch.jobs[0].supervision.terms:
            for loss, per_slot in self.terms[term](batch.predictions, together[1], together[0]).items():
                for job, count in zip(batch.jobs, counts):
                    sums = (job.supervision.weight * per_slot[:, job.slots].sum(1) / count).unbind()
                    for layer, row in zip(job.layers, batch.rows(job)):
                        _add(values, weights, loss_name(loss, job.name, layer, job.last), sums[row], self.weights[loss])
        for job, own, count in zip(batch.jobs, pairs, counts):
            for loss, sums in job.assignment.losses.items():
                for layer, value in zip(job.layers, (job.supervision.weight * sums / count).unbind()):
                    name = loss_name(loss, job.name, layer, job.last)
                    _add(values, weights, name, value, self.weights.get(loss, 1.0))
            self._log(batch, job, own, values)

    def _log(self, batch: _Batch, job: _Job, pairs: TargetPairs, values: dict[str, Tensor]) -> None:
        """Add the entries that are only logged."""
        scale, logits = job.supervision.weight, batch.predictions.logits.detach()
        if job.layers[-1] == job.last and not job.supervision.class_agnostic:
            error = class_error(logits, pairs, job.assignment, batch.layers.index(job.last))
            values[loss_name("class_error", job.name, job.last, job.last)] = scale * error
        copies = job.supervision.copies(job.slots.stop - job.slots.start)
        objects = torch.tensor([size * copies for size in job.targets.sizes])
        errors = cardinality_error(logits[:, :, job.slots], send(objects, logits.device)).unbind()
        for layer, row in zip(job.layers, batch.rows(job)):
            values[loss_name("cardinality_error", job.name, layer, job.last)] = scale * errors[row]
        if not any(job.targets.sizes):
            return  # without targets an assignment is neither good nor bad: a 0 would spoil averages
        for entry, value in job.assignment.logs.items() if job.layers[-1] == job.last else ():
            values[loss_name(entry, job.name, job.last, job.last)] = value
        if job.decides and not self.training and "dup" not in values:
            found, padded = batch.predictions, PaddedTargets.of(job.targets)
            last = batch.layers.index(job.last)
            values["dup"] = duplicates(found.logits[last, :, job.slots], found.boxes[last, :, job.slots], padded)

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


def _chosen(batches: list[_Batch]) -> Tensor | None:
    """Return the query of every target, for `LossReport`."""
    for batch in batches:
        for job in batch.jobs:
            if job.decides:
                slots = chosen_slots(job.assignment, batch.layers.index(job.last), job.targets)
                return torch.where(slots < 0, slots, slots - job.slots.start)
    return None


def _taught(batch: _Batch, job: _Job) -> Taught:
    """Return the pairs of a job, which count in the stack of its batch, as pairs of its set."""
    own = job.assignment
    number = send(torch.tensor(batch.layers), own.layer.device)[own.layer]
    counted = replace(own, layer=number, slot=own.slot - job.slots.start)
    return Taught(job.name, job.supervision, job.layers, counted)


def _add(values: dict[str, Tensor], weights: dict[str, float], name: str, value: Tensor, weight: float) -> None:
    values[name] = values[name] + value if name in values else value
    weights[name] = weight


def _of_last_layer(assignment: Assignment, job: _Job) -> Assignment:
    """Return the ready-made pairs of the last layer, the only one supervised without auxiliary losses, as layer 0.

    Those of other layers stay with weight 0: how many there are is known on the device only.
    """
    last = (job.last + 1 if job.supervision.layers is None else len(job.supervision.layers)) - 1
    here = assignment.layer == last
    weight, score = assignment.weight, assignment.score
    return replace(
        assignment,
        layer=torch.zeros_like(assignment.layer),
        weight=here.float() if weight is None else torch.where(here, weight, 0.0),
        score=None if score is None else torch.where(here, score, 0.0),
        ignore=None if assignment.ignore is None else assignment.ignore[last:],
        losses={name: sums[last:] for name, sums in assignment.losses.items()},
    )


def _in_stack(assignment: Assignment, batch: _Batch, job: _Job) -> Assignment:
    """Return ready-made pairs, which count in their own set, as pairs that count in the stack."""
    rows, layer = batch.rows(job), assignment.layer
    if rows != list(range(len(rows))):
        layer = send(torch.tensor(rows), layer.device)[layer]
    return replace(assignment, layer=layer, slot=assignment.slot + job.slots.start)


def _join(batch: _Batch) -> Assignment:
    """Return the pairs of all jobs as one assignment of the stack."""
    parts = [job.assignment for job in batch.jobs]
    if len(parts) == 1 and parts[0].ignore is None:
        return parts[0]
    weight = score = ignore = None
    if any(part.weight is not None or part.score is not None for part in parts):
        ones = [torch.ones_like(part.slot, dtype=torch.float32) for part in parts]
        weights = [one if part.weight is None else part.weight for part, one in zip(parts, ones)]
        weight = torch.cat(weights)
    if any(part.score is not None for part in parts):
        score = torch.cat([w.detach() if part.score is None else part.score for part, w in zip(parts, weights)])
    if any(part.ignore is not None for part in parts):
        ignore = torch.zeros_like(batch.predictions.logits[..., 0], dtype=torch.bool)
        for job in batch.jobs:
            for row, own in zip(batch.rows(job), () if job.assignment.ignore is None else job.assignment.ignore):
                ignore[row, :, job.slots] = own
    flat = [torch.cat([getattr(p, name) for p in parts]) for name in ("layer", "image", "slot", "target")]
    return Assignment(*flat, weight=weight, score=score, ignore=ignore)


def _gather(targets: FlatTargets, assignment: Assignment) -> TargetPairs:
    """Return the target of every pair."""
    index = targets.starts[assignment.image] + assignment.target
    return TargetPairs(targets.labels[index], targets.boxes[index].float())


def _average_counts(counts: list[float | Tensor], device: torch.device, *, over_all: bool) -> Tensor | list[float]:
    """Return each count, at least 1, averaged over processes if `over_all`: one all-reduce for the whole step."""
    if not (over_all and dist.is_available() and dist.is_initialized()):
        return [c.clamp(min=1) if isinstance(c, Tensor) else max(c, 1.0) for c in counts]
    # The plain numbers travel in one copy that does not wait for the device.
    vector = send(torch.tensor([0.0 if isinstance(c, Tensor) else c for c in counts]), device)
    for i, count in enumerate(counts):
        if isinstance(count, Tensor):
            vector[i] = count.detach()
    dist.all_reduce(vector)
    return (vector / dist.get_world_size()).clamp(min=1)
