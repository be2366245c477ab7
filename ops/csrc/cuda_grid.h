// Blocks for kernels with one thread per number. No PyTorch here.
#pragma once

#include <algorithm>

#include "cuda_layout.h"

namespace assigndetr {

inline dim3 plain_grid(int64_t threads) {
  constexpr int64_t most = int64_t(1) << 20;  // the kernels stride over what is left
  return dim3(static_cast<unsigned>(std::min((threads + kThreads - 1) / kThreads, most)));
}

}  // namespace assigndetr
