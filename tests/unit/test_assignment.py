"""Linear assignment of many problems: the compiled code against SciPy, and the matcher that uses it against `match`."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import ops
from models.assign import HungarianMatcher, Request
from models.assign.hungarian import UNMATCHABLE, match
from ops import build
from ops.assignment import solve, solve_by_scipy
from tests.unit.soft_cases import random_predictions, random_target
from util.structures import FlatTargets, Supervision

ROOT = Path(__file__).resolve().parents[2]
REASON = build.why_not_on_first_use("assignment") if build.built_library("assignment") is None else None


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def solver(request):
    """Every test runs with the compiled code, where it can be built, and without."""
    if request.param == "compiled" and REASON:
        pytest.skip(f"no compiled solver here: {REASON}")
    ops.set_backend("auto" if request.param == "compiled" else "reference")
    yield request.param
    ops.set_backend("auto")


def lay_out(costs: list[np.ndarray], repeats: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat costs and the table of problems, rows of each one after the other."""
    sizes = [cost.size for cost in costs]
    offsets = np.cumsum([0, *sizes])[:-1]
    rows = [[o, *c.shape, c.shape[1], k] for o, c, k in zip(offsets, costs, repeats)]
    return np.concatenate([c.ravel() for c in costs]).astype(np.float32), np.array(rows)


def check_optimal(costs: list[np.ndarray], repeats: list[int]) -> None:
    """Check all of what `solve` promises about these problems."""
    index, slot, target = solve(*lay_out(costs, repeats))
    assert (np.diff(index) >= 0).all()
    for i, (cost, repeat) in enumerate(zip(costs, repeats)):
        slots, targets = slot[index == i], target[index == i]
        assert len(slots) == min(cost.shape[1], repeat * cost.shape[0])
        assert (np.diff(slots) > 0).all()
        if len(slots):
            assert np.bincount(targets).max() <= repeat
            tiled = np.tile(cost.astype(np.float32), (repeat, 1)).astype(np.float64)
            best = tiled[linear_sum_assignment(tiled)].sum()
            assert tiled[targets, slots].sum() == pytest.approx(best, rel=1e-6, abs=1e-6)


def test_two_targets_that_want_one_slot_share_as_cheaply_as_possible() -> None:
    # Both want slot 1. Giving it to target 0 costs 1 + 4, to target 1 costs 2 + 1.
    found = solve(*lay_out([np.array([[5.0, 1.0, 2.0], [4.0, 1.0, 9.0]])], [1]))
    assert found.tolist() == [[0, 0], [1, 2], [1, 0]]


def test_a_target_that_may_have_two_slots_gets_its_two_cheapest() -> None:
    found = solve(*lay_out([np.array([[5.0, 1.0, 2.0, 0.5], [1.0, 9.0, 9.0, 9.0]])], [2]))
    # Target 1 needs a second slot: 9 for any; slot 2 costs target 0 least.
    assert found.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3], [1, 0, 1, 0]]


@pytest.mark.parametrize("repeat", [1, 2, 6])
def test_random_problems_of_many_sizes_are_solved_as_cheaply_as_by_scipy(repeat: int) -> None:
    rng = np.random.default_rng(repeat)
    shapes = [(m, n) for m in (1, 2, 7, 20) for n in (1, 5, 63, 64, 65, 300)]
    check_optimal([rng.normal(size=shape) for shape in shapes], [repeat] * len(shapes))


@pytest.mark.parametrize("repeat", [1, 3])
def test_slots_that_all_targets_want_are_shared_as_cheaply_as_by_scipy(repeat: int) -> None:
    # Long chains of exchanges; with many slots the search drops those that nobody can need.
    rng = np.random.default_rng(0)
    shapes = [(5, 40), (20, 300), (20, 1500), (40, 900)]
    costs = [rng.normal(size=(1, n)) + 0.05 * rng.normal(size=(m, n)) for m, n in shapes]
    check_optimal(costs, [repeat] * len(costs))


@pytest.mark.parametrize("repeat", [1, 2, 4])
def test_equal_costs_are_solved_as_cheaply_as_by_scipy(repeat: int) -> None:
    rng = np.random.default_rng(repeat)
    shapes = [(1, 3), (6, 6), (8, 100), (30, 25)]
    for values in (1, 2, 5):  # so many different costs
        check_optimal([rng.integers(values, size=shape).astype(float) for shape in shapes], [repeat] * len(shapes))


def test_products_of_two_scales_and_costs_far_apart_are_solved_as_cheaply_as_by_scipy() -> None:
    rng = np.random.default_rng(0)
    worst = np.outer(np.arange(1, 31), np.arange(1, 61)).astype(float)  # as bad as it gets for shortest paths
    far = np.where(rng.random((9, 70)) < 0.5, UNMATCHABLE, rng.normal(size=(9, 70)))
    check_optimal([worst, worst.T, far, -far], [1, 1, 3, 3])


def test_problems_without_targets_or_slots_have_no_pairs() -> None:
    check_optimal([np.zeros((0, 5)), np.ones((2, 3)), np.zeros((4, 0)), np.ones((1, 1))], [1, 2, 3, 6])
    assert solve(np.empty(0, np.float32), np.empty((0, 5), np.int64)).shape == (3, 0)


def test_rows_may_lie_apart() -> None:
    rng = np.random.default_rng(0)
    costs = rng.normal(size=(4, 3, 50)).astype(np.float32)
    table = np.array([[layer * 50 + 10, 4, 30, 150, 2] for layer in range(3)])
    index, slot, target = solve(costs.ravel(), table)
    for layer in range(3):
        slots, targets = match(costs[:, layer, 10:40], repeat=2)
        assert slot[index == layer].tolist() == slots.tolist()
        assert target[index == layer].tolist() == targets.tolist()


def test_the_number_of_threads_does_not_change_the_pairs() -> None:
    rng = np.random.default_rng(0)
    costs = [rng.integers(4, size=(8, 400)).astype(float) for _ in range(40)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(solve(*lay_out(costs, [2] * len(costs))))
    finally:
        torch.set_num_threads(threads)
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_a_problem_beyond_the_costs_is_refused() -> None:
    with pytest.raises(ValueError, match="problem 1 reaches beyond the 6 costs"):
        solve(np.zeros(6, np.float32), np.array([[0, 2, 3, 3, 1], [1, 2, 3, 3, 1]]))


def test_costs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError):
        solve(np.full(6, np.nan, np.float32), np.array([[0, 2, 3, 3, 1]]))


def step_requests() -> list[Request]:
    """Return what a step asks for: crowded and empty images, repeats, blocks, some layers, parts of the slots."""
    torch.manual_seed(0)
    stack, targets = random_predictions(layers=3, images=4, slots=40), [random_target(n) for n in (5, 0, 23, 1)]
    for index, target in enumerate(targets):
        target.image_id = 10 + index
    encoder, flat = random_predictions(layers=1, images=4, slots=90), FlatTargets.of(targets)
    return [
        Request("one2one", stack, flat, Supervision(), slots=slice(0, 15)),
        Request("one2many", stack, flat, Supervision(repeat=3), slots=slice(15, 40), rows=[0, 2], layers=[1, 5]),
        Request("blocks", stack, flat, Supervision(block=12, repeat=2)),
        Request("encoder", encoder, flat, Supervision(class_agnostic=True)),
        Request("nothing", encoder, FlatTargets.of([random_target(0)] * 4), Supervision()),
    ]


def test_a_whole_step_is_matched_as_image_by_image_with_scipy() -> None:
    requests, matcher = step_requests(), HungarianMatcher()
    for request, found in zip(requests, matcher(requests), strict=True):
        costs, expected = matcher.costs(request.predictions, request.targets).numpy(), []
        ends = np.cumsum(request.targets.sizes)
        for image, (end, size) in enumerate(zip(ends, request.targets.sizes)):
            for row in request.rows if size else ():
                cost = costs[end - size : end, row, request.slots]
                supervision = request.supervision
                slots, targets = match(cost, repeat=supervision.repeat, block=supervision.block)
                expected += [(row, image, s + request.slots.start, t) for s, t in zip(slots, targets)]
        pairs = torch.stack([found.layer, found.image, found.slot, found.target], 1)
        assert pairs.tolist() == [list(map(int, pair)) for pair in expected]


def test_predictions_that_are_not_finite_are_matched_last_and_named_by_set_layer_and_image() -> None:
    requests = step_requests()
    boxes = requests[0].predictions.boxes.detach().clone()
    boxes[2, 2, 3:30] = torch.nan  # the last layer of an image with 23 objects: 13 slots of 40 are left
    requests[0].predictions.boxes = boxes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = HungarianMatcher()(requests)
    said = [str(warning.message) for warning in caught if "matching costs" in str(warning.message)]
    assert [message.split(" (")[1].split(")")[0] for message in said] == [
        "set one2one, layer 2, image id 12",
        "set one2many, layer 5, image id 12",
        *["set blocks, layer 2, image id 12"] * 3,
    ]
    assert said[0].startswith(f"{23 * 12} of {23 * 15} matching costs are not finite")
    assert len(found[0]) == 3 * (5 + 15 + 1)
    own = found[0].slot[(found[0].layer == 2) & (found[0].image == 0)]
    assert len(own.unique()) == 5


def test_the_costs_of_the_caller_stay_as_they_are() -> None:
    costs, table = lay_out([np.random.default_rng(0).normal(size=(7, 30))], [2])
    before = costs.copy()
    solve(costs, table)
    assert (costs == before).all()


def test_both_ways_give_the_same_pairs_where_there_is_one_optimum(solver: str) -> None:
    problems = lay_out([np.random.default_rng(i).normal(size=(9, 80)) for i in range(6)], [1, 1, 2, 2, 6, 30])
    assert (solve(*problems) == solve_by_scipy(*problems)).all()


def test_without_a_compiler_one_line_says_so_and_scipy_solves(tmp_path: Path, solver: str) -> None:
    if solver == "compiled":
        pytest.skip("once is enough")
    program = (
        "import numpy as np; from ops import build; build.built_library = lambda kind: None\n"
        "from ops.assignment import solve\n"
        "for _ in range(2): print(solve(np.float32([3, 1, 2, 9]), np.array([[0, 2, 2, 2, 1]])).tolist())"
    )
    environment = os.environ | {"CXX": "no-such-compiler", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path), "LOCAL_RANK": "0"}
    environment.pop("ASSIGNDETR_OPS_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "[[0, 0], [0, 1], [1, 0]]\n" * 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(said) == 1
    assert "no assignment kernel, using SciPy" in said[0] and "no-such-compiler" in said[0]
