"""What an analysis gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from models.criterion import Criterion
from models.detector import Detector
from util.analysis.points import AttentionOptions
from util.errors import UserError
from util.logger import Meters, Progress
from util.structures import ImageBatch, Target


@dataclass
class Subject:
    """A detector with trained weights and all its training schemes, and the images to look at it with."""

    model: Detector
    criterion: Criterion
    loader: DataLoader
    device: torch.device
    folder: Path  # for the results, exists
    label: str  # what the curves of this detector are called
    others: list[Path] = field(default_factory=list)  # results of the same analysis to draw beside it
    print_freq: int = 10
    attention: AttentionOptions | None = None  # what `analyse_attention` draws

    def batches(self, what: str) -> Iterator[tuple[ImageBatch, list[Target]]]:
        """Return the batches on the device, with progress lines that begin with `what`."""
        progress = Progress(what, len(self.loader), print_freq=self.print_freq)
        for images, targets in progress.over(self.loader, Meters()):
            yield images.to(self.device), [t.to(self.device) for t in targets]

    def train_without_chance(self) -> None:
        """Make every training scheme alive; dropout and stochastic depth are off and no statistics change."""
        self.model.eval()
        self.model.groups.train()
        for module in self.model.groups.modules():
            if isinstance(module, nn.Dropout):
                module.eval()


def read_json(path: Path, analysis: str) -> dict[str, Any]:
    """Return what an earlier run of `analysis` wrote.

    Raises:
        UserError: the file is no JSON, or of something else.
    """
    wanted = f"give {analysis}.json files that --analyse {analysis} wrote"
    try:
        result = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise UserError(f"--analyse_with: {path} is not a JSON file ({error}); {wanted}") from error
    kind = result.get("analysis") if isinstance(result, dict) else None
    if kind != analysis:
        found = f"of the analysis {kind}" if kind else "not of an analysis"
        raise UserError(f"--analyse_with: {path} is {found}; {wanted}")
    return result
