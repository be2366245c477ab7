"""What the compiler says about the CUDA kernels. Needs nvcc, not a GPU."""

import pytest

from ops import build, resources

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN10assigndetr13fast_backwardIN3c104HalfELi4ENS_9FixedSumsIfEEEEvNS_4PlanE'
ptxas info    : Function properties for _ZN10assigndetr13fast_backwardIN3c104HalfELi4ENS_9FixedSumsIfEEEEvNS_4PlanE
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 80 registers, used 0 barriers, 648 bytes cmem[0]
ptxas info    : Function properties for _ZN10assigndetr15generic_forwardIddEEvPKT_NS_6LevelsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers
ptxas info    : Function properties for _ZN10assigndetr12fast_forwardIN3c104HalfELi4ENS_11FusedSourceIS2_fEEEEvNS_4PlanE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 63 registers, used 0 barriers
"""


def test_the_report_of_the_compiler_is_read():
    assert resources.parse_report(REPORT, "80") == [
        resources.Usage("fast_backward half 4 fixed", "80", 80, 8, 16),
        resources.Usage("fast_forward half 4 fused", "80", 63, 0, 0),
        resources.Usage("generic_forward double", "80", 64, 0, 0),
    ]


@pytest.mark.skipif(build.find_cuda_home() is None, reason="no nvcc here")
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_no_kernel_keeps_in_memory_what_belongs_into_registers(architecture):
    found = resources.kernel_usage(architecture)
    names = [usage.kernel for usage in found]
    # 2 sources; 5 counts of lanes, 3 types, a forward and two backward kernels; 4 types of generic ones; 2 conversions;
    # then, for matching, 4 types of the costs and the solver with few and with many warps.
    assert len(names) == len(set(names)) == 2 * (5 * 3 * 3 + 4 * 3) + 2 + 4 + 2
    assert {usage.kernel: usage.spilled for usage in found if usage.spilled} == {}
    assert max(usage.registers for usage in found) <= 128
