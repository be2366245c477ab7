// An assignment problem, as the solvers for the host and for the GPU get it. Nothing of PyTorch in here.
#pragma once

#include <algorithm>
#include <cstdint>

namespace assigndetr {

struct Problem {
  const float* cost;  // of target t and slot s: cost[t * stride + s], finite
  int64_t targets, slots, stride;
  int64_t repeat;  // slots that a target may get
  int64_t pairs() const { return std::min(slots, targets * repeat); }
};

}  // namespace assigndetr
