"""The whole training step on a GPU; what runs on the CPU everywhere must give the same numbers there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ops
from models import build_criterion, build_model
from models.assign import HungarianMatcher
from ops.assignment import gpu_solver_ready, solve_by_scipy, solve_on_gpu
from ops.pair_cost import pair_costs, pair_costs_ready
from tests.ops.test_assignment_cuda_emulated import lay_out
from tests.ops.test_pair_cost import WEIGHTS, draw
from tests.tiny import TWO_STAGE, make_target, tiny_args, tiny_images, tiny_targets
from tests.unit.soft_cases import output_of, random_predictions, random_target
from tests.unit.test_assignment import step_requests
from tests.waitless import FLAGS, ask_nothing, new_state, take_steps
from util.engine import StepSettings
from util.nonfinite import skips_on_device
from util.optim import build_optimizer
from util.structures import Predictions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def losses(device: str, flags: str) -> dict[str, float]:
    torch.manual_seed(5)
    model, criterion, _ = build_model(tiny_args(flags))
    model, criterion = model.to(device), criterion.to(device)
    images, targets = tiny_images().to(device), [t.to(device) for t in tiny_targets()]
    report = criterion(model(images, targets), targets)
    report.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    return {name: value.item() for name, value in report.terms.items()}


@pytest.mark.parametrize("flags", ["", f"{TWO_STAGE} --mixed_selection --look_forward_twice"])
def test_losses_on_the_gpu_are_those_on_the_cpu(flags: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert losses("cuda", flags) == pytest.approx(losses("cpu", flags), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mixed_precision_step_on_the_gpu_is_finite(dtype: torch.dtype) -> None:
    with torch.autocast("cuda", dtype):
        assert losses("cuda", TWO_STAGE)["loss_ce"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        "--matcher cost-greedy",
        "--matcher soft",
        "--matcher soft-literal",
        "--matcher soft --scg rounds --soft_extra_layers 1 --cls_target hard",
        "--matcher soft --scg rowpeak --column_competition sinkhorn --no-soft_background",
        "--matcher soft --probe_per_layer --layer_consistency last --probe_value prediction",
    ],
)
def test_matching_without_a_solver_and_its_losses_never_wait_for_the_gpu(flags: str) -> None:
    criterion = build_criterion(tiny_args(flags)).to("cuda")
    predictions = random_predictions()
    predictions = Predictions(
        predictions.logits.cuda().requires_grad_(),
        predictions.boxes.cuda().requires_grad_(),
        embeds=[x.cuda().requires_grad_() for x in predictions.embeds],
    )
    for targets in ([random_target(5), random_target(2)], [make_target(), make_target()]):
        on_device = [t.to("cuda") for t in targets]
        criterion(output_of(predictions), on_device, 0.0).total.backward()  # kernels and memory are there afterwards
        torch.cuda.set_sync_debug_mode("error")
        try:
            criterion(output_of(predictions), on_device, 0.0).total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_compiled_kernel_is_the_one_in_use() -> None:
    assert ops.active_backend("cuda") == "cuda"
    assert gpu_solver_ready(torch.device("cuda"))


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("flags", FLAGS)
def test_a_whole_optimisation_step_never_waits_for_the_gpu(
    flags: str, amp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_nothing(monkeypatch)
    device, settings = torch.device("cuda"), StepSettings(amp=amp)
    state = new_state(*build_model(tiny_args(flags))[:2], device)
    state.scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16")
    take_steps(state, device, settings)  # kernels, memory and moments are there afterwards
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(state, device, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in state.model.parameters())


def test_the_optimiser_of_a_training_on_a_gpu_leaves_out_bad_steps_by_itself() -> None:
    args = tiny_args()
    model, criterion, _ = build_model(args)
    model.to("cuda")
    optimizer = build_optimizer(args, model, criterion)
    assert skips_on_device(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan) if p.requires_grad else None
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


@pytest.mark.parametrize("repeat", [1, 2, 6])
def test_the_solver_on_the_gpu_is_as_cheap_as_scipy(repeat: int) -> None:
    assert gpu_solver_ready(torch.device("cuda"))  # loads it: this test may run alone
    rng = np.random.default_rng(repeat)
    # The last ones: large blocks with much shared memory, and beyond it.
    shapes = [(m, n) for m in (0, 1, 7, 20, 60) for n in (1, 33, 300, 900, 1500)] + [(5, 9000), (20, 22223)]
    costs = [rng.normal(size=(1, n)) + 0.1 * rng.normal(size=(m, n)) for m, n in shapes]
    costs += [rng.integers(3, size=shape).astype(float) for shape in ((8, 100), (30, 25), (100, 300))]
    flat, table = lay_out(costs, [repeat] * len(costs))
    found = solve_on_gpu(flat.cuda(), table.numpy(), 1e6).cpu().numpy()
    wanted = solve_by_scipy(flat.numpy(), table.numpy())
    assert (found[0] == wanted[0]).all()
    for i, (offset, _, _, stride, _) in enumerate(table.tolist()):
        paid = [
            flat.numpy()[offset + pairs[2] * stride + pairs[1]].sum(dtype=np.float64)
            for pairs in (found[:, found[0] == i], wanted[:, wanted[0] == i])
        ]
        assert paid[0] == pytest.approx(paid[1], rel=1e-6, abs=1e-6)
        assert (np.diff(found[1][found[0] == i]) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matching_costs_on_the_gpu_are_those_of_the_host(dtype: torch.dtype) -> None:
    logits, boxes, *rest = draw(layers=7, batch=3, slots=300, classes=91, targets=20, scale=1.0)
    inputs = (logits.to(dtype), boxes, *rest)
    assert pair_costs_ready(torch.device("cuda")) and pair_costs_ready(torch.device("cpu"))
    expected = pair_costs(*inputs, **WEIGHTS)
    found = pair_costs(*(x.cuda() for x in inputs), **WEIGHTS)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-5)


def test_a_step_is_matched_on_the_gpu_as_on_the_host() -> None:
    requests = step_requests()
    expected = HungarianMatcher()(requests)
    for request in requests:
        request.predictions = Predictions(request.predictions.logits.cuda(), request.predictions.boxes.cuda())
        request.targets.labels, request.targets.boxes = request.targets.labels.cuda(), request.targets.boxes.cuda()
        request.targets.image = request.targets.image.cuda()
    for found, wanted in zip(HungarianMatcher()(requests), expected, strict=True):
        for name in ("layer", "image", "slot", "target"):
            assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name))
        assert found.count == wanted.count


def test_a_training_on_a_cpu_continues_on_a_gpu() -> None:
    states = []
    for device in ("cpu", "cuda"):
        states.append(new_state(*build_model(tiny_args())[:2], torch.device(device)))
    take_steps(states[0], torch.device("cpu"))
    for group in states[0].optimizer.param_groups:
        group["fused"] = None  # as in a file of a training on a CPU
    states[0].step = 0
    states[1].resume(states[0].state_dict(), "file")
    take_steps(states[1], torch.device("cuda"))
    steps = [moments["step"] for moments in states[1].optimizer.state.values()]
    assert all(step.is_cuda and step.item() == 4 for step in steps)
