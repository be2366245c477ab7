// The table of problems as it comes from Python, checked: what a solver would otherwise read out of bounds.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <vector>

#include "problem.h"

namespace assigndetr {

constexpr int64_t kFields = 5;  // of a problem: offset, targets, slots, stride, repeat

inline std::vector<Problem> read_problems(const at::Tensor& costs, const at::Tensor& problems) {
  TORCH_CHECK_VALUE(costs.dim() == 1 && costs.is_contiguous() && costs.scalar_type() == at::kFloat,
                    "costs must be a contiguous float32 vector");
  TORCH_CHECK_VALUE(problems.is_cpu() && problems.dim() == 2 && problems.size(1) == kFields &&
                        problems.is_contiguous() && problems.scalar_type() == at::kLong,
                    "problems must be a contiguous int64 table with ", kFields, " columns on the CPU");
  const int64_t most = std::numeric_limits<int32_t>::max() / 2;  // GPUs use a bit of a column's number
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

}  // namespace assigndetr
