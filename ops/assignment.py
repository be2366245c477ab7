"""Linear assignment of many problems in one call: compiled code where it can be built, SciPy elsewhere.

All find an optimum; where several cost the same they may choose different ones. The compiled code needs 0.03 to 0.3 of
SciPy's time (`python util/benchmark.py matching`) and uses PyTorch's threads; their number does not change the result.
On a GPU the costs stay where they are and nobody waits for them.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .selection import use_compiled

FIELDS = ("offset", "targets", "slots", "stride", "repeat")
ON_GPU = "assigndetr::assign_on_gpu"
# How many pairs there are is an argument, so that graphs know the shape without looking into the table.
torch.library.define(ON_GPU, "(Tensor costs, Tensor problems, int pairs, float unmatchable) -> Tensor")


def solve(costs: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """Return the cheapest pairs of every problem.

    Args:
        costs: (E,) float32, finite: those of all problems.
        problems: (P, 5) int64, the columns of `FIELDS`. Target t of a problem and its slot s cost
            `costs[offset + t * stride + s]`; a target may get `repeat` slots, a slot one target.

    Returns:
        (3, R) int64: problem, slot and target of every pair. There are min(slots, repeat * targets) in each; problems
        in order, slots ascending in each.

    Raises:
        ValueError: a problem reaches beyond `costs`, or the pairs of least cost cannot be told because costs are not
            finite.
    """
    problems = np.ascontiguousarray(problems, np.int64).reshape(-1, len(FIELDS))
    costs = np.ascontiguousarray(costs, np.float32)
    if host_solver_ready():
        return torch.ops.assigndetr_ext.assign(torch.from_numpy(costs), torch.from_numpy(problems)).numpy()
    return solve_by_scipy(costs, problems)


def host_solver_ready() -> bool:
    """Return whether compiled code does the matching on the CPU, building it if it was not built yet."""
    return use_compiled("assignment", "SciPy and plain PyTorch, which are slower")


def gpu_solver_ready(device: torch.device) -> bool:
    """Return whether `solve_on_gpu` takes costs on `device`, building it if it was not built yet.

    Where a GPU has none, which is said once, costs have to go to the host and the GPU waits.
    """
    return device.type == "cuda" and use_compiled("cuda", "the solver on the host, which the GPU waits for")


def solve_on_gpu(costs: Tensor, problems: np.ndarray, unmatchable: float) -> Tensor:
    """Return what `solve` returns, on the device of the costs and without waiting for it.

    Args:
        costs: (E,) float32 on a GPU.
        problems: see `solve`.
        unmatchable: stands for costs that are not finite; nobody can say that there are some without waiting.

    Raises:
        ValueError: a problem reaches beyond `costs`.
    """
    problems = np.ascontiguousarray(problems, np.int64).reshape(-1, len(FIELDS))
    table = torch.from_numpy(problems)
    return torch.ops.assigndetr.assign_on_gpu(costs, table, int(number_of_pairs(problems).sum()), unmatchable)


def number_of_pairs(problems: np.ndarray) -> np.ndarray:
    """Return how many pairs each problem (P, 5) has."""
    _, targets, slots, _, repeat = problems.T
    return np.minimum(slots, targets * repeat)


@torch.library.impl(ON_GPU, "default")
def _on_gpu(costs: Tensor, problems: Tensor, pairs: int, unmatchable: float) -> Tensor:
    return torch.ops.assigndetr_ext.assign_cuda(costs, problems, unmatchable)


@torch.library.register_fake(ON_GPU)
def _on_gpu_shape(costs: Tensor, problems: Tensor, pairs: int, unmatchable: float) -> Tensor:
    return costs.new_empty((3, pairs), dtype=torch.int64)


def solve_by_scipy(costs: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """Return what `solve` returns, from one call of SciPy per problem."""
    found = [np.empty((3, 0), np.int64)]
    for index, (offset, targets, slots, stride, repeat) in enumerate(problems.tolist()):
        if targets and slots:
            last = offset + (targets - 1) * stride + slots
            if last > len(costs):
                raise ValueError(f"problem {index} reaches beyond the {len(costs)} costs")
            strides = (stride * costs.itemsize, costs.itemsize)
            cost = np.lib.stride_tricks.as_strided(costs[offset:last], (targets, slots), strides, writeable=False)
            pairs = match_by_scipy(cost, repeat)
            found.append(np.stack([np.full(len(pairs[0]), index), *pairs]))
    return np.concatenate(found, 1)


def match_by_scipy(cost: np.ndarray, repeat: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the slots (ascending) and targets of the cheapest pairs of a finite cost (M, N)."""
    # The same list k times, one after the other: t1 t2 t3 t1 t2 t3, as published.
    rows, found = linear_sum_assignment(np.tile(cost, (repeat, 1)))
    order = found.argsort()
    return found[order], rows[order] % len(cost)
