"""Copies to a device: when they may go on by themselves."""

import re
from pathlib import Path

import pytest
import torch

from ops.transfer import send
from util.structures import Target

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("device", "waits"), [("cuda:1", False), (torch.device("cuda"), False), ("mps", True)])
def test_a_copy_waits_only_where_it_would_read_memory_that_is_given_away(monkeypatch, device, waits: bool) -> None:
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: asked.append((args, options)) or self)
    send(torch.ones(1), device)
    Target(torch.zeros(0), torch.zeros(0, 4), image_id=0, orig_size=(1, 1)).to(device, non_blocking=True)
    assert asked and set(map(str, asked)) == {str(((device,), {"non_blocking": not waits}))}


def test_models_leave_it_to_send_whether_a_copy_waits() -> None:
    own = [path for folder in ("models", "ops", "datasets") for path in (ROOT / folder).rglob("*.py")]
    found = [path.name for path in own if re.search(r"non_blocking\s*=", path.read_text())]
    assert found == ["transfer.py"]
