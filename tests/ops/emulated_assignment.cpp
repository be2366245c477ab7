// What matches on the GPU, costs and solver, as functions for the CPU, called by tests/ops/emulated_cuda.py.
#include <c10/util/BFloat16.h>

#include "emulated_cuda.h"
static bool asserted;  // a GPU would stop there
#define ASSIGNDETR_ASSERT(condition) \
  if (!(condition)) {                \
    asserted = true;                 \
    return;                          \
  }
#include "cuda_assignment.h"
#include "cuda_costs.h"

using namespace assigndetr;

extern "C" {

// Fill costs (targets, layers, slots); `numbers` are those of CostSizes. 0 if the kernel would stop.
int pair_costs_of(int half, const void* logits, const float* boxes, const int64_t* labels, const int64_t* images,
                  const float* targets, const int64_t* numbers, const float* weights, float* costs) {
  CostSizes n;
  std::memcpy(&n, numbers, sizeof(n));
  const CostWeights by{weights[0], weights[1], weights[2], weights[3]};
  asserted = false;
  if (half) {
    launch_pair_costs(static_cast<const c10::BFloat16*>(logits), boxes, labels, images, targets, n, by, costs, 0);
  } else {
    launch_pair_costs(static_cast<const float*>(logits), boxes, labels, images, targets, n, by, costs, 0);
  }
  return !asserted;
}

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

// Leave out columns of the problem (targets, slots, stride, repeat) as `warps` warps do. Return how many are left, -1
// after an error; `left` gets which, or is left alone if all are, and `kept` their costs, row by row.
int64_t drop_columns(float* costs, const int64_t* numbers, int warps, float unmatchable, int* left, float* kept) {
  const Form form = form_of(numbers[0], numbers[1], numbers[3]);
  std::vector<double> memory(memory_bytes(form) / sizeof(double), std::nan(""));
  Job found{};
  const auto run = [&](auto count) {
    constexpr int kWarps = decltype(count)::value;
    const auto kernel = [&] {
      Job job{costs, numbers[2], static_cast<int>(numbers[0]), unmatchable, form, form.turned,
              reinterpret_cast<char*>(memory.data()), nullptr};
      ColumnDropper<kWarps>{job}.drop();
      found = job;
    };
    emulated::launch(kernel, dim3(1), kWarps * kWarp)();
  };
  try {
    warps == 1 ? run(std::integral_constant<int, 1>()) : run(std::integral_constant<int, kSmallWarps>());
  } catch (const std::exception&) {
    return -1;
  }
  if (found.left != nullptr) {
    std::copy(found.left, found.left + found.form.columns, left);
    for (int row = 0; row < form.rows; ++row) {
      for (int j = 0; j < found.form.columns; ++j) {
        *kept++ = found.read(found.row_of(row), j);
      }
    }
  }
  return found.form.columns;
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
