"""Every preset builds its full-size model, makes one training step and detects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import build_model
from tests.test_configs import PRESETS, flags_of, name_of, parsed
from tests.tiny import tiny_images, tiny_targets


@pytest.mark.parametrize("preset", PRESETS, ids=name_of)
def test_preset_makes_a_training_step_at_full_size_and_detects(preset: Path) -> None:
    args = parsed(flags_of(preset, "--backbone_weights", "none", "--num_classes", "5"))
    model, criterion, postprocessor = build_model(args)
    images, targets = tiny_images([(96, 128), (80, 101)]), tiny_targets()
    report = criterion(model(images, targets), targets)
    report.total.backward()
    assert torch.isfinite(report.total)
    untouched = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not untouched, f"parameters without a gradient would stop a distributed run: {untouched[:5]}"
    with torch.no_grad():
        output = model.eval()(images)
    detections = postprocessor(output, [(96, 128), (80, 101)], [1, 2])
    assert len(detections) == 2 and len(detections[0].scores) == 100
