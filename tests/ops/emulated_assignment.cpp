// The CUDA solver of assignment problems as functions for the CPU, called by tests/ops/emulated_cuda.py.
#include "emulated_cuda.h"
#include "cuda_assignment.h"

using namespace assigndetr;

extern "C" {

// Run a kernel that is wrong: one warp of a block leaves before a barrier. 1 if that is noticed.
int split_block() {
  const auto wrong = [] {
    if (threadIdx.x < kWarp) {
      __syncthreads();
    }
  };
  try {
    emulated::launch(wrong, dim3(1), 2 * kWarp)();
  } catch (const std::logic_error&) {
    return 1;
  }
  return 0;
}

// Solve problems (count, 5). `kinds` gets how many are small, in large blocks with shared memory, and with scratch.
// Return the number of pairs, of which there is room for `room`, or -1 after an error.
int64_t assign(float* costs, const int64_t* problems, int64_t count, float unmatchable, int64_t shared_bytes,
               int backwards, int64_t room, int64_t* pairs, int64_t* kinds) {
  emulated::backwards = backwards;
  std::vector<Problem> list;
  for (const int64_t* p = problems; p < problems + 5 * count; p += 5) {
    list.push_back({costs + p[0], p[1], p[2], p[3], p[4]});
  }
  const AssignmentPlan plan = plan_assignment(list, costs, shared_bytes);
  kinds[0] = plan.small, kinds[1] = kinds[2] = 0;
  for (const Task& task : plan.tasks) {
    ++kinds[task.scratch != kNoScratch ? 2 : 1];
  }
  kinds[1] -= plan.small;
  std::vector<double> scratch(plan.scratch_bytes / sizeof(double) + 1, std::nan(""));
  if (plan.pairs > room) {
    return -1;
  }
  try {
    launch_assignment(plan, costs, plan.tasks.data(), unmatchable, reinterpret_cast<char*>(scratch.data()), pairs, 0);
  } catch (const std::exception&) {
    return -1;
  }
  return plan.pairs;
}
}
