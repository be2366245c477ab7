"""A loss or a gradient is not a finite number: tell, keep the evidence, skip the step, give up in time.

On the host's own time (`deferred` off) every step asks and waits for the answer. On a GPU the step skips itself and the
host learns of it some steps later, so that it never waits: see `NonFiniteGuard`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from util import dist
from util.errors import UserError
from util.structures import ImageBatch, LossReport, Target

DUMPS = 5  # files kept per process; a batch of 16 large images takes 150 MB
LATEST = 8  # answers that may be on their way, two per step: so many steps' batches are kept on the GPU as evidence


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether `optimizer` can leave out a step by itself: fused AdamW on a GPU reads a flag there.

    Fused SGD reads it too, but keeps a momentum without value if its very first step is left out (PyTorch 2.6 to 2.15).
    """
    groups = optimizer.param_groups
    on_gpu = all(p.is_cuda for group in groups for p in group["params"])
    return isinstance(optimizer, torch.optim.AdamW) and on_gpu and all(group.get("fused") for group in groups)


def voided(loss: Tensor, finite: bool | Tensor) -> Tensor:
    """Return `loss` such that all its gradients are NaN where `finite`, a scalar on the device, is false.

    An infinite loss may have finite gradients. With this, one look at the gradients tells whether to step, also after
    they were added up over batches and processes.
    """
    return loss * torch.where(finite, 1.0, torch.nan) if isinstance(finite, Tensor) else loss


class NonFiniteGuard:
    """Watches losses and gradients; every process comes to the same verdict.

    Deferred, verdicts are scalars on the device, and whoever gets one has to act upon it there. They travel to the host
    in copies that nobody waits for. What is said, saved and counted is the same, up to `LATEST` / 2 steps late; the
    batches of these steps stay alive until then. Gradients that are not finite are told without the names of their
    parameters, as they are gone by then. The scaler of fp16 does not wait either: it hands its own check, a pass over
    all gradients, to the fused optimiser. Weights never take a step that is not finite in either case.

    Args:
        output_dir: where the batch of a bad step is written as `nonfinite_*.pth`; None: nowhere.
        limit: so many bad steps in a row stop the run.
        deferred: never wait for the device.
    """

    def __init__(self, output_dir: Path | None, limit: int, *, deferred: bool = False) -> None:
        self.output_dir, self.limit, self.deferred = output_dir, limit, deferred
        self.in_a_row = 0
        self.dumped = 0
        self._pending: deque[_Answer] = deque()
        self._void = False  # a loss of the present window of batches was bad: its gradients are no news

    def loss_is_finite(
        self, report: LossReport, images: ImageBatch, targets: list[Target], *, epoch: int, step: int
    ) -> bool | Tensor:
        """Say whether the total is finite in every process; deferred: on the device, else one number goes to the host.

        Asked before the backward pass: a process that left it out alone would leave the others waiting.

        Raises:
            UserError: too many in a row.
        """
        evidence = replace(report, total=report.total.detach())  # without the graph: it outlives the step
        own = torch.isfinite(evidence.total)
        everywhere = dist.everywhere(own)

        def look(all_finite: bool, own_finite: bool) -> None:
            if all_finite:
                return
            self._void = self.deferred
            if not own_finite:
                self._tell(evidence, images, targets, epoch, step)
            self._count("losses")

        if not self.deferred:
            finite = bool(everywhere.item())
            look(finite, finite or bool(own.item()))
            return finite
        self._look_at_answers(LATEST)
        self._pending.append(_Answer(torch.stack([everywhere, own]), look))
        return everywhere

    def gradient_is_finite(
        self, norm: Tensor, *modules: nn.Module, epoch: int, step: int, scaled: bool = False
    ) -> bool | Tensor:
        """Say whether the norm of all gradients, the same number in every process, is finite.

        Not deferred: a second number to the host, and with a matcher that has no solver the second wait of the step.

        Args:
            modules: whose parameters have these gradients.
            scaled: fp16, where an overflow now and then is how the scaler finds its scale.

        Raises:
            UserError: too many in a row.
        """
        finite = torch.isfinite(norm)

        def look(healthy: bool) -> None:
            void, self._void = self._void, False
            if void:
                return
            if healthy:
                self.in_a_row = 0
                return
            if not scaled:
                example = "" if self.deferred else _in_which(modules)
                dist.info(
                    f"epoch {epoch} step {step}: the loss is finite and the gradient is not{example}; step skipped"
                )
            self._count("gradients")

        if not self.deferred:
            look(verdict := bool(finite.item()))
            return verdict
        self._pending.append(_Answer(finite[None], look))
        return finite

    def finish(self) -> None:
        """Wait for the answers that are on their way, as at the end of an epoch and before weights are saved.

        Raises:
            UserError: too many in a row.
        """
        self._look_at_answers(0)

    def _look_at_answers(self, most: int) -> None:
        """Look at those that have come, and wait for the oldest while there are more than `most`.

        Of several processes each looks at a given answer in the same step, whenever it came: too many bad ones end them
        all at once. One that ended before the others would leave them waiting for it.
        """
        early = not dist.is_distributed()
        while self._pending and (len(self._pending) > most or (early and self._pending[0].ready())):
            self._pending.popleft().look()

    def _tell(self, report: LossReport, images: ImageBatch, targets: list[Target], epoch: int, step: int) -> None:
        guilty = [name for name, value in report.terms.items() if not torch.isfinite(value).all()]
        ids = [t.image_id for t in targets]
        saved = self._dump(images, targets, epoch, step)
        print(
            f"epoch {epoch} step {step}: the loss is {report.total.item()}; not finite: "
            f"{', '.join(guilty) or 'the sum only'}; image ids {ids}; step skipped{saved}",
            flush=True,
        )

    def _dump(self, images: ImageBatch, targets: list[Target], epoch: int, step: int) -> str:
        if self.output_dir is None or self.dumped >= DUMPS:
            return ""
        self.dumped += 1
        path = self.output_dir / f"nonfinite_epoch{epoch}_step{step}_rank{dist.rank()}.pth"
        batch = {
            "pixels": images.pixels.cpu(),
            "padding": images.padding.cpu(),
            "sizes": images.sizes,
            "targets": [{"labels": t.labels.cpu(), "boxes": t.boxes.cpu(), "image_id": t.image_id} for t in targets],
        }
        torch.save(batch, path)
        return f"; batch saved to {path}"

    def _count(self, what: str) -> None:
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.in_a_row} non-finite {what} in a row (--max_nonfinite {self.limit}). Usual causes, in this "
                "order: the rate (lower --lr, add --warmup_steps 1000), mixed precision (--amp bf16 or --amp off in "
                "place of fp16), a wrong annotation (see the image ids above). Continue from the last good checkpoint"
            )


class _Answer:
    """Flags on their way to the host, and what to do with them there."""

    def __init__(self, flags: Tensor, then: Callable[..., None]) -> None:
        self.flags, self.then = flags, then
        self.arrived = None
        if flags.is_cuda:
            self.flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self.flags.copy_(flags, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(flags.device))

    def ready(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def look(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()
        self.then(*self.flags.tolist())


def _in_which(modules: tuple[nn.Module, ...]) -> str:
    """Name some parameters whose gradients are not finite."""
    named = [entry for module in modules for entry in module.named_parameters()]
    bad = [n for n, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
    return f", in {len(bad)} parameters, for example {', '.join(bad[:3])}"
