// Many assignment problems in one call, shared out over threads. Called by ops/assignment.py.
#include "assignment.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>

#include "problem_check.h"

namespace assigndetr {
namespace {

constexpr int64_t kCostsPerThread = 1 << 15;  // waking a thread costs as much as solving some ten thousand entries

// Return (3, P): problem, slot and target of every pair; problems in order, slots ascending in each.
at::Tensor assign(const at::Tensor& costs, const at::Tensor& problems) {
  TORCH_CHECK_VALUE(costs.is_cpu(), "costs must be on the CPU, found ", costs.device());
  const std::vector<Problem> list = read_problems(costs, problems);
  std::vector<int64_t> starts{0};
  int64_t entries = 0;
  for (const Problem& problem : list) {
    starts.push_back(starts.back() + problem.pairs());
    entries += problem.targets * problem.slots;
  }
  at::Tensor pairs = at::empty({3, starts.back()}, problems.options());
  int64_t* const index = pairs.mutable_data_ptr<int64_t>();
  int64_t* const slots = index + starts.back();
  int64_t* const targets = slots + starts.back();
  // Problems differ in size: whoever is free takes the next one.
  const int64_t count = static_cast<int64_t>(list.size());
  const int64_t threads = std::min<int64_t>({at::get_num_threads(), count, 1 + entries / kCostsPerThread});
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, /*grain_size=*/1, [&](int64_t, int64_t) {
    AssignmentSolver solver;
    for (int64_t i = next++; i < count; i = next++) {
      std::fill(index + starts[i], index + starts[i + 1], i);
      try {
        solver.solve(list[i], slots + starts[i], targets + starts[i]);
      } catch (const std::domain_error& error) {
        TORCH_CHECK_VALUE(false, "problem ", i, ": ", error.what());
      }
    }
  });
  return pairs;
}

}  // namespace
}  // namespace assigndetr

TORCH_LIBRARY_FRAGMENT(assigndetr_ext, m) {
  m.def("assign(Tensor costs, Tensor problems) -> Tensor", &assigndetr::assign);
}
