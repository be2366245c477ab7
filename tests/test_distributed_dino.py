"""Denoising in two processes: nothing hangs where images show nothing, and the divisors are as published.

Each process has as many denoising groups as its own images need, so its losses are divided by the number of objects
averaged over processes times its own number of groups; in Co-DINO by the average of their products.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.test_distributed import CPU, in_two_processes, step_of
from tests.test_distributed_heads import SCENES, images_of, targets_of, trained
from util.engine import distribute

DINO = (
    "--num_feature_levels 3 --with_box_refine --two_stage --mixed_selection --look_forward_twice --query_pos box "
    "--decoder_norm --share_heads --dn_number 60"
)
SCHEMES = {
    "dino": DINO,
    "divided": f"{DINO} --dn_groups divided",
    "dino_and_hybrid_branch": f"{DINO} --num_queries_one2many 6 --k_one2many 2",
}
GROUPS = {6: 10, 1: 60, 0: 1}  # 60 // objects


def losses(step: torch.nn.Module, scene: str, which: int) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3 + which)  # of the noise
    report = step(images_of(which), targets_of(scene, which), 0)
    return report.total, report.terms


def _train(rank: int, folder: str) -> None:
    found = {}
    for scheme, flags in SCHEMES.items():
        step = step_of(flags)
        wrapped = distribute(step, CPU)
        for scene in SCENES:  # with the same wrapper: it would complain of a parameter that got no gradient before
            step.zero_grad()
            total, terms = losses(wrapped, scene, rank)
            total.backward()
            gradients = {n: None if p.grad is None else p.grad.clone() for n, p in trained(step)}
            found[scheme, scene] = {"total": total.detach(), "terms": terms, "gradients": gradients}
    torch.save(found, f"{folder}/{rank}.pth")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found, by scheme and scene."""
    return in_two_processes(_train, tmp_path_factory.mktemp("dino"))


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_parameter_has_the_same_finite_gradient_in_both_processes(
    processes: list[dict], scheme: str, scene: str
) -> None:
    one, other = (found[scheme, scene] for found in processes)
    assert one["total"].isfinite() and other["total"].isfinite()
    for name, gradient in one["gradients"].items():
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.isfinite().all(), f"{name} has a gradient that is not finite"
        assert torch.equal(gradient, other["gradients"][name]), f"{name} has two gradients"


@pytest.mark.parametrize("scene", SCENES)
def test_denoising_is_divided_by_the_average_number_of_objects_and_the_own_groups(
    processes: list[dict], scene: str
) -> None:
    counts = [len(boxes) for boxes in SCENES[scene]]
    average = max(sum(counts) / 2, 1)
    for rank, found in enumerate(processes):
        step = step_of(DINO)
        _, alone = losses(step, scene, rank)
        (group,) = step.model.groups["dn"](_context(scene, rank))
        (taught,) = group.supervision
        assert taught.assign.factor == GROUPS[counts[rank]]
        for name in ("loss_ce_dn", "loss_bbox_dn", "loss_giou_dn", "loss_bbox_0_dn"):
            expected = alone[name] * max(counts[rank], 1) / average
            torch.testing.assert_close(found["dino", scene]["terms"][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scene", SCENES)
def test_divided_denoising_is_divided_by_the_average_number_of_positive_queries(
    processes: list[dict], scene: str
) -> None:
    counts = [len(boxes) for boxes in SCENES[scene]]
    positives = [count * GROUPS[count] for count in counts]
    for rank, found in enumerate(processes):
        _, alone = losses(step_of(SCHEMES["divided"]), scene, rank)
        for name in ("loss_ce_dn", "loss_bbox_dn", "loss_giou_dn", "loss_bbox_0_dn"):
            expected = alone[name] * max(positives[rank], 1) / max(sum(positives) / 2, 1)
            torch.testing.assert_close(found["divided", scene]["terms"][name], expected, rtol=1e-4, atol=1e-6)


def _context(scene: str, rank: int):
    from models.groups.base import Context

    return Context(None, None, None, targets_of(scene, rank), 0, None)


def test_a_process_without_objects_still_has_the_denoising_losses_as_zeros(processes: list[dict]) -> None:
    terms = processes[1]["dino", "some_and_none"]["terms"]
    assert [terms[name].item() for name in ("loss_ce_dn", "loss_bbox_dn", "loss_giou_0_dn")] == [0.0, 0.0, 0.0]
    assert processes[0]["dino", "some_and_none"]["terms"]["loss_bbox_dn"] > 0
