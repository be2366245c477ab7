"""A loss or a gradient is not a finite number: tell, keep the evidence, skip the step, give up in time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from util import dist
from util.errors import UserError
from util.structures import ImageBatch, LossReport, Target

DUMPS = 5  # files kept per process; a batch of 16 large images takes 150 MB


class NonFiniteGuard:
    """Watches losses and gradients; every process comes to the same verdict.

    Args:
        output_dir: where the batch of a bad step is written as `nonfinite_*.pth`; None: nowhere.
        limit: so many bad steps in a row stop the run.
    """

    def __init__(self, output_dir: Path | None, limit: int) -> None:
        self.output_dir, self.limit = output_dir, limit
        self.in_a_row = 0
        self.dumped = 0

    def loss_is_finite(
        self, report: LossReport, images: ImageBatch, targets: list[Target], *, epoch: int, step: int
    ) -> bool:
        """Say whether the total is finite in every process; one number goes to the host.

        Asked before the backward pass: a process that left it out alone would leave the others waiting.

        Raises:
            UserError: too many in a row.
        """
        finite = torch.isfinite(report.total.detach())
        if dist.all_true(finite):
            return True
        if not finite.item():
            guilty = [name for name, value in report.terms.items() if not torch.isfinite(value).all()]
            ids = [t.image_id for t in targets]
            saved = self._dump(images, targets, epoch, step)
            print(
                f"epoch {epoch} step {step}: the loss is {report.total.item()}; not finite: "
                f"{', '.join(guilty) or 'the sum only'}; image ids {ids}; step skipped{saved}",
                flush=True,
            )
        self._count("losses")
        return False

    def gradient_is_finite(
        self, norm: Tensor, *modules: nn.Module, epoch: int, step: int, scaled: bool = False
    ) -> bool:
        """Say whether the norm of all gradients, the same number in every process, is finite.

        A second number to the host, and with a matcher that has no solver the second wait of the step.

        Args:
            modules: whose parameters have these gradients.
            scaled: fp16, where an overflow now and then is how the scaler finds its scale.

        Raises:
            UserError: too many in a row.
        """
        if torch.isfinite(norm).item():
            self.in_a_row = 0
            return True
        if scaled:
            self._count("gradients")
            return False
        named = [entry for module in modules for entry in module.named_parameters()]
        bad = [n for n, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
        dist.info(
            f"epoch {epoch} step {step}: the loss is finite and the gradient is not, in {len(bad)} parameters, for "
            f"example {', '.join(bad[:3])}; step skipped"
        )
        self._count("gradients")
        return False

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
