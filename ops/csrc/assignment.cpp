// Many assignment problems in one call, shared out over threads. Called by ops/assignment.py.
#include "assignment.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>

namespace assigndetr {
namespace {

constexpr int64_t kFields = 5;  // of a problem: offset, targets, slots, stride, repeat
constexpr int64_t kCostsPerThread = 1 << 15;  // waking a thread costs as much as solving some ten thousand entries

std::vector<Problem> read_problems(const at::Tensor& costs, const at::Tensor& problems) {
  TORCH_CHECK_VALUE(costs.is_cpu() && costs.dim() == 1 && costs.is_contiguous() && costs.scalar_type() == at::kFloat,
                    "costs must be a contiguous float32 vector on the CPU");
  TORCH_CHECK_VALUE(problems.is_cpu() && problems.dim() == 2 && problems.size(1) == kFields &&
                        problems.is_contiguous() && problems.scalar_type() == at::kLong,
                    "problems must be a contiguous int64 table with ", kFields, " columns on the CPU");
  const int64_t most = std::numeric_limits<int32_t>::max();
  const int64_t* field = problems.const_data_ptr<int64_t>();
  std::vector<Problem> list;
  for (int64_t i = 0; i < problems.size(0); ++i, field += kFields) {
    const int64_t offset = field[0], targets = field[1], slots = field[2], stride = field[3], repeat = field[4];
    TORCH_CHECK_VALUE(offset >= 0 && targets >= 0 && slots >= 0 && stride >= 0 && repeat >= 1 && targets <= most &&
                          slots <= most && repeat <= most && targets <= most / repeat,
                      "problem ", i, " has sizes that cannot be: offset ", offset, ", targets ", targets, ", slots ",
                      slots, ", stride ", stride, ", repeat ", repeat);
    const Problem problem{costs.const_data_ptr<float>() + offset, targets, slots, stride, repeat};
    TORCH_CHECK_VALUE(problem.pairs() == 0 || offset + (targets - 1) * stride + slots <= costs.numel(), "problem ", i,
                      " reaches beyond the ", costs.numel(), " costs");
    list.push_back(problem);
  }
  return list;
}

// Return (3, P): problem, slot and target of every pair; problems in order, slots ascending in each.
at::Tensor assign(const at::Tensor& costs, const at::Tensor& problems) {
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
