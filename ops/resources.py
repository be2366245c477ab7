"""What the CUDA kernels take of a multiprocessor: `python -m ops.resources` compiles them and prints the report.

Needs nvcc, but neither a GPU nor PyTorch with CUDA.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from . import build

ARCHITECTURES = ("80", "90")
TYPES = {"float": "float", "half": "c10::Half", "bfloat16": "c10::BFloat16", "double": "double"}

# Naming the functions that launch the kernels compiles all kernels they choose from.
_PROGRAM = """
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#define ASSIGNDETR_LAUNCH(kernel, grid, stream) kernel<<<grid, kThreads, 0, stream>>>
#define ASSIGNDETR_LAUNCH_BLOCKS(kernel, blocks, threads, bytes, stream) kernel<<<blocks, threads, bytes, stream>>>
#define ASSIGNDETR_SHARED(name) extern __shared__ __align__(16) char name[]
#define ASSIGNDETR_ASSERT(condition) assert(condition)
#include <cassert>
#include "cuda_assignment.h"
#include "cuda_costs.h"
#include "cuda_launch.h"
namespace assigndetr {
template <typename scalar_t, typename T, typename Source>
void kernels_of() {
  (void)&launch_forward<scalar_t, T, Source, cudaStream_t>;
  (void)&launch_backward<scalar_t, T, Source, PlainSums<T>, cudaStream_t>;
  (void)&launch_backward<scalar_t, T, Source, FixedSums<T>, cudaStream_t>;
}
template <typename scalar_t, typename T>
void kernels() {
  (void)&launch_pair_costs<scalar_t, T, cudaStream_t>;
  kernels_of<scalar_t, T, StoredSource<T>>();
  kernels_of<scalar_t, T, FusedSource<scalar_t, T>>();
  (void)&launch_fixed_to_float<T, cudaStream_t>;
}
"""


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture. `spilled`: bytes kept in memory for want of registers, in and out."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int


def kernel_usage(architecture: str, types: tuple[str, ...] = tuple(TYPES)) -> list[Usage]:
    """Compile the kernels for one architecture, such as "90", and return what each of them takes.

    Raises:
        FileNotFoundError: if there is no nvcc.
        RuntimeError: if the kernels do not compile.
    """
    home = build.find_cuda_home()
    if home is None:
        raise FileNotFoundError("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")
    csrc = Path(build.__file__).resolve().parent / "csrc"
    solver = "auto* const solver = &launch_assignment<cudaStream_t>;"
    instances = [f"template void kernels<{TYPES[t]}, {'double' if t == 'double' else 'float'}>();" for t in types]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.cu"
        source.write_text("\n".join([_PROGRAM, solver, *instances, "}"]))
        command = [home / "bin" / "nvcc", "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
        includes = ["-I", csrc, "-I", Path(torch.__file__).parent / "include"]
        done = subprocess.run(
            [*command, *includes, "-o", Path(folder) / "kernels.cubin", source], capture_output=True, text=True
        )
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA kernels do not compile for sm_{architecture}:\n{done.stderr}")
    return parse_report(done.stderr, architecture)


def parse_report(report: str, architecture: str) -> list[Usage]:
    """Return what ptxas reports with -v for each kernel; tests/ops/test_cuda_resources.py has an example."""
    found = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    return sorted(
        (
            Usage(_readable(name), architecture, int(registers), int(stack), int(stores) + int(loads))
            for name, stack, stores, loads, registers in found
        ),
        key=lambda usage: usage.kernel,
    )


def _readable(symbol: str) -> str:
    """Return "fast_backward half 4 fixed" for _ZN10assigndetr13fast_backwardIN3c104HalfELi4ENS_9FixedSumsIfEEEEv...

    The solver of assignment problems has a number of warps: "solve_assignment 4".
    """
    if solver := re.match(r"_ZN10assigndetr\d+(solve_assignment)ILi(\d+)E", symbol):
        return " ".join(solver.groups())
    named = re.match(r"_ZN10assigndetr\d+((?:fast|generic|fixed|pair)_[a-z_]+)I(.*?)EEv|$", symbol)
    if not named[1]:
        return symbol
    name, arguments = named[1], named[2]
    value = next((t for t, mark in (("half", "Half"), ("bfloat16", "BFloat16")) if mark in arguments), None)
    value = value or ("double" if arguments.startswith("d") else "float")
    lanes = re.search(r"Li(\d+)E", arguments)
    sums = "fixed" if "FixedSums" in arguments else "plain" if "PlainSums" in arguments else None
    source = "fused" if "FusedSource" in arguments else None
    return " ".join(part for part in (name, value, lanes and lanes[1], sums, source) if part)


def main() -> None:
    """Print a table for the architectures given as arguments, or for `ARCHITECTURES`."""
    head = "kernel, type, lanes or warps, sums, source"
    print(f"{head:<44} {'arch':>5} {'registers':>9} {'stack':>6} {'spilled':>7}")
    for architecture in sys.argv[1:] or ARCHITECTURES:
        for usage in kernel_usage(architecture):
            name = f"{usage.kernel:<44} {'sm_' + usage.architecture:>5}"
            print(f"{name} {usage.registers:>9} {usage.stack:>6} {usage.spilled:>7}")


if __name__ == "__main__":
    main()
