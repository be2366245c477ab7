"""Auxiliary heads in two processes: nothing hangs without objects, and the divisors are those of the joint batch.

ATSS divides by numbers averaged over processes, so that the mean over processes, which DDP takes, is the loss of one
process with all images: the class and centreness losses always (every image counts at least one positive), the box loss
where the targets of the centreness add up to at least one per process (its divisor is at least 1 in each). RPN and RoI
head divide by the anchors and regions sampled in their own process (specification: "of the whole batch", no average):
nearly the same number everywhere, as samples are filled up to 256 and 512 of an image.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.test_distributed import CPU, in_two_processes, step_of
from tests.tiny import make_target, tiny_images
from util.engine import TrainStep, distribute
from util.structures import ImageBatch, Target

SIDE = 128
HEADS = "--num_feature_levels 3 --with_box_refine --two_stage --mixed_selection --aux_heads atss faster_rcnn"
SCHEMES = {"heads": HEADS, "heads_and_hybrid_branch": f"{HEADS} --num_queries_one2many 6 --k_one2many 2"}
MANY = [[0.2 + 0.3 * (i % 3), 0.25 + 0.4 * (i // 3), 0.5, 0.45] for i in range(6)]
SCENES = {"some_and_none": (MANY, []), "none_at_all": ([], []), "many_and_one": (MANY, [[0.5, 0.4, 0.5, 0.6]])}
LOSSES_OF_ATSS = ("loss_cls_atss", "loss_bbox_atss", "loss_centerness_atss")


def images_of(*which: int) -> ImageBatch:
    whole = tiny_images(((SIDE, SIDE), (SIDE, SIDE)))
    chosen = list(which)
    return replace(whole, pixels=whole.pixels[chosen], padding=whole.padding[chosen], sizes=[(SIDE, SIDE)] * len(which))


def targets_of(scene: str, *which: int) -> list[Target]:
    return [make_target(SCENES[scene][i], [i % 4] * len(SCENES[scene][i]), image_id=i) for i in which]


def losses(step: torch.nn.Module, scene: str, *which: int) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)  # of the random samples
    report = step(images_of(*which), targets_of(scene, *which), 0)
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


def trained(step: TrainStep) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in step.named_parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found, by scheme and scene."""
    return in_two_processes(_train, tmp_path_factory.mktemp("heads"))


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
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_mean_over_processes_of_the_atss_losses_is_the_loss_of_the_joint_batch(
    processes: list[dict], scheme: str, scene: str
) -> None:
    _, joint = losses(step_of(SCHEMES[scheme]), scene, 0, 1)
    parts = [found[scheme, scene]["terms"] for found in processes]
    names = [*LOSSES_OF_ATSS]
    if scene != "none_at_all":  # the divisor of the other losses is at least 1 in each process, not in each image
        names += ["loss_ce", "loss_bbox", "loss_giou", "loss_bbox_0", "loss_giou_enc"]
    for name in names:
        mean = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(mean, joint[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_boxes_of_the_positive_queries_count_as_in_the_joint_batch(processes: list[dict]) -> None:
    _, joint = losses(step_of(HEADS), "some_and_none", 0, 1)
    parts = [found["heads", "some_and_none"]["terms"] for found in processes]
    # The process without objects has positives of neither head: nothing to add but its zero in the count.
    for name in ("loss_bbox_co_atss", "loss_giou_co_atss", "loss_bbox_0_co_atss", "loss_giou_0_co_atss"):
        assert parts[0][name] > 0 and parts[1][name] == 0
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, joint[name], rtol=1e-4, atol=1e-6)


def test_the_box_loss_of_atss_without_any_positive_is_zero_and_not_nan(processes: list[dict]) -> None:
    for found in processes:
        terms = found["heads", "none_at_all"]["terms"]
        assert terms["loss_bbox_atss"] == 0 and terms["loss_centerness_atss"] == 0 and terms["loss_cls_atss"] > 0


@pytest.mark.parametrize("scene", SCENES)
def test_both_stages_of_faster_rcnn_are_divided_by_the_samples_of_their_own_process(
    processes: list[dict], scene: str
) -> None:
    for rank, found in enumerate(processes):
        _, alone = losses(step_of(HEADS), scene, rank)
        for name in ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"):
            name = f"{name}_faster_rcnn"
            torch.testing.assert_close(found["heads", scene]["terms"][name], alone[name], rtol=1e-4, atol=1e-6)
