"""The source of the solver for GPUs, run on the CPU thread by thread: what needs no GPU to be right or wrong."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ops.assignment import solve_by_scipy
from tests.ops import emulated_cuda

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++").split()[0]) is None or not hasattr(os, "fork"),
    reason="no C++ compiler, or a system without coroutines in C",
)
UNMATCHABLE = 1e6


def lay_out(costs: list[np.ndarray], repeats: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the flat costs and the table of problems, rows of each one after the other."""
    offsets = np.cumsum([0, *(cost.size for cost in costs)])[:-1]
    rows = [[o, *c.shape, c.shape[1], k] for o, c, k in zip(offsets, costs, repeats)]
    flat = np.concatenate([c.ravel() for c in costs]).astype(np.float32)
    return torch.from_numpy(flat), torch.tensor(np.array(rows, np.int64).reshape(-1, 5))


def check_optimal(costs: list[np.ndarray], repeats: list[int], **options) -> list[int]:
    """Check all that `solve_on_gpu` promises about these problems; return how many had which memory."""
    (index, slot, target), kinds = emulated_cuda.assign(*lay_out(costs, repeats), **options)
    assert (index.diff() >= 0).all()
    for i, (cost, repeat) in enumerate(zip(costs, repeats)):
        slots, targets = slot[index == i].numpy(), target[index == i].numpy()
        assert len(slots) == min(cost.shape[1], repeat * cost.shape[0])
        assert (np.diff(slots) > 0).all()
        if len(slots):
            assert np.bincount(targets).max() <= repeat
            tiled = np.tile(cost.astype(np.float32), (repeat, 1)).astype(np.float64)
            tiled[~np.isfinite(tiled)] = UNMATCHABLE
            best = tiled[linear_sum_assignment(tiled)].sum()
            assert tiled[targets, slots].sum() == pytest.approx(best, rel=1e-6, abs=1e-6)
    return kinds


def test_two_targets_that_want_one_slot_share_as_cheaply_as_possible() -> None:
    # Both want slot 1. Giving it to target 0 costs 1 + 4, to target 1 costs 2 + 1.
    found, _ = emulated_cuda.assign(*lay_out([np.array([[5.0, 1.0, 2.0], [4.0, 1.0, 9.0]])], [1]))
    assert found.tolist() == [[0, 0], [1, 2], [1, 0]]


def test_a_target_that_may_have_two_slots_gets_its_two_cheapest() -> None:
    found, _ = emulated_cuda.assign(*lay_out([np.array([[5.0, 1.0, 2.0, 0.5], [1.0, 9.0, 9.0, 9.0]])], [2]))
    # Target 1 needs a second slot: 9 for any; slot 2 costs target 0 least.
    assert found.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3], [1, 0, 1, 0]]


@pytest.mark.parametrize("repeat", [1, 2, 6])
def test_random_problems_are_solved_as_cheaply_as_by_scipy(repeat: int) -> None:
    rng = np.random.default_rng(repeat)
    shapes = [(m, n) for m in (1, 2, 7, 20) for n in (1, 5, 31, 32, 33, 129, 300)] + [(90, 2)]
    check_optimal([rng.normal(size=shape) for shape in shapes], [repeat] * len(shapes))


@pytest.mark.parametrize("repeat", [1, 3])
def test_slots_that_all_targets_want_are_shared_as_cheaply_as_by_scipy(repeat: int) -> None:
    rng = np.random.default_rng(0)  # long chains of exchanges
    shapes = [(5, 40), (12, 200)]
    costs = [rng.normal(size=(1, n)) + 0.05 * rng.normal(size=(m, n)) for m, n in shapes]
    check_optimal(costs, [repeat] * len(costs))


@pytest.mark.parametrize("repeat", [1, 4])
def test_equal_costs_are_solved_as_cheaply_as_by_scipy(repeat: int) -> None:
    rng = np.random.default_rng(repeat)
    costs = [rng.integers(v, size=s).astype(float) for v in (1, 2, 5) for s in [(1, 3), (6, 6), (8, 100), (30, 25)]]
    check_optimal(costs, [repeat] * len(costs))


def test_products_of_two_scales_and_costs_far_apart_are_solved_as_cheaply_as_by_scipy() -> None:
    rng = np.random.default_rng(0)
    worst = np.outer(np.arange(1, 17), np.arange(1, 33)).astype(float)  # as bad as it gets for shortest paths
    far = np.where(rng.random((9, 70)) < 0.5, UNMATCHABLE, rng.normal(size=(9, 70)))
    check_optimal([worst, worst.T, far, -far], [1, 1, 3, 3])


def test_problems_without_targets_or_slots_have_no_pairs_and_need_no_launch() -> None:
    check_optimal([np.zeros((0, 5)), np.ones((2, 3)), np.zeros((4, 0)), np.ones((1, 1))], [1, 2, 3, 6])
    empty, kinds = emulated_cuda.assign(*lay_out([np.zeros((0, 5))], [1]))
    assert empty.shape == (3, 0) and kinds == [0, 0, 0]


def test_costs_that_are_not_finite_are_the_last_ones_taken() -> None:
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(4, 50))
    cost[:, 3:] = np.nan
    cost[0, :3], cost[1, 7], cost[2, 9] = np.inf, -np.inf, np.inf
    crowded = rng.normal(size=(9, 4))
    crowded[2:5, 1:3] = np.nan
    check_optimal([cost, np.full((3, 20), np.nan), crowded], [1, 2, 1])


def test_many_slots_are_solved_by_large_blocks_with_memory_of_the_multiprocessor_or_beyond() -> None:
    rng = np.random.default_rng(0)
    costs = [rng.normal(size=(1, n)) + 0.1 * rng.normal(size=(m, n)) for m, n in ((3, 100), (4, 1100), (5, 2500))]
    # 24 bytes for each row, 28 for each column: 30 904 and 70 128.
    assert check_optimal(costs, [1, 2, 1], shared_bytes=48 << 10) == [1, 1, 1]
    assert check_optimal(costs, [1, 2, 1], shared_bytes=99 << 10) == [1, 2, 0]


def test_columns_that_are_not_among_the_cheapest_of_a_row_are_left_out() -> None:
    # Slot s costs the first target 49 - s and the second one |s - 20|; both may take two, so the four cheapest count.
    slots = torch.arange(50.0)
    left, kept = emulated_cuda.drop_columns(torch.stack([49 - slots, (slots - 20.2).abs()]), repeat=2)
    assert left == [19, 20, 21, 22, 46, 47, 48, 49]
    assert kept[0].tolist() == [30.0, 29.0, 28.0, 27.0, 3.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize(("targets", "slots", "repeat"), [(1, 33, 1), (7, 300, 1), (3, 200, 6), (40, 3, 2), (90, 2, 1)])
def test_the_cheapest_columns_of_every_row_stay_with_their_costs(targets, slots, repeat, warps) -> None:
    apart = torch.randn(targets, slots + 5, generator=torch.Generator().manual_seed(targets))
    apart[0, 1], apart[-1, 0], apart[0, slots - 1] = torch.nan, torch.inf, -torch.inf
    left, kept = emulated_cuda.drop_columns(apart[:, :slots], repeat, warps)
    rows = torch.where(apart.isfinite(), apart, torch.tensor(1e6))[:, :slots]
    if targets * repeat > slots:  # the slots choose among copies of the targets
        rows, repeat = rows.T.repeat(1, repeat), 1
    assert len(left) < rows.shape[1] and left == sorted(set(left))
    assert torch.equal(kept, rows[:, left])
    for row in rows:
        bound = row.sort().values[len(rows) * repeat - 1]
        assert set(torch.nonzero(row < bound).flatten().tolist()) < set(left)
        assert (row[left] <= bound).sum() >= len(rows) * repeat


def test_all_columns_stay_where_rows_want_most_of_them() -> None:
    cost = torch.randn(30, 300, generator=torch.Generator().manual_seed(0))
    assert emulated_cuda.drop_columns(cost)[0] == list(range(300))
    # Few rows that want different ones: found out only by looking.
    spread = torch.ones(12, 300)
    spread[torch.arange(300) % 12, torch.arange(300)] = 0
    assert emulated_cuda.drop_columns(spread)[0] == list(range(300))


def test_rows_may_lie_apart() -> None:
    costs = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    table = torch.tensor([[layer * 50 + 10, 4, 30, 150, 2] for layer in range(3)])
    found, _ = emulated_cuda.assign(costs.flatten(), table)
    assert (found.numpy() == solve_by_scipy(costs.flatten().numpy(), table.numpy())).all()


def test_pairs_are_those_of_the_solver_on_the_host_where_there_is_one_optimum() -> None:
    costs = [np.random.default_rng(i).normal(size=(9, 80)) for i in range(6)]
    costs, table = lay_out(costs, [1, 1, 2, 2, 6, 30])
    found, _ = emulated_cuda.assign(costs, table)
    assert (found.numpy() == solve_by_scipy(costs.numpy(), table.numpy())).all()


def test_of_equally_cheap_slots_the_first_free_one_is_taken() -> None:
    found, _ = emulated_cuda.assign(*lay_out([np.ones((3, 200))], [1]))
    assert found[1].tolist() == [0, 1, 2]


def test_the_order_in_which_threads_run_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    shapes = [(7, 150), (12, 40), (30, 25), (3, 1100)]
    problems = lay_out([rng.integers(-4, 5, size=shape).astype(float) for shape in shapes], [1, 3, 2, 2])
    straight, backwards = (emulated_cuda.assign(*problems, backwards=order)[0] for order in (False, True))
    assert torch.equal(straight, backwards)


def test_emulated_warps_that_do_not_meet_are_noticed() -> None:
    assert emulated_cuda.compiled_solver().split_block() == 1
