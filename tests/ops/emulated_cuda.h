// Enough of CUDA to run kernels on the CPU: one warp after the other, its 32 lanes as coroutines that meet at shuffles.
// Lanes that do not all come to the same shuffle are an error, as they would hang or compute nonsense on a GPU.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y;
  explicit dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};

struct alignas(8) float2 {
  float x, y;
};

inline dim3 blockIdx, gridDim, blockDim, threadIdx;

namespace emulated {

constexpr int kLanes = 32;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  unsigned shuffles;  // so far
  bool done;
};

inline Lane lanes[kLanes];
inline ucontext_t scheduler;
inline int current;
inline uint64_t slots[2][kLanes];  // two: a lane may be one shuffle ahead of another
inline std::function<void()> body;

inline void run_lane() {
  body();
  lanes[current].done = true;
  swapcontext(&lanes[current].context, &scheduler);
}

inline void run_warp(unsigned first_thread) {
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    makecontext(&lane.context, run_lane, 0);
    lane.shuffles = 0;
    lane.done = false;
  }
  while (!lanes[0].done) {
    for (current = 0; current < kLanes; ++current) {
      threadIdx.x = first_thread + current;
      swapcontext(&scheduler, &lanes[current].context);
    }
    for (const Lane& lane : lanes) {
      if (lane.done != lanes[0].done || lane.shuffles != lanes[0].shuffles) {
        throw std::logic_error("the lanes of a warp do not meet at a shuffle");
      }
    }
  }
}

// Exchange a value with lane `source` of the warp.
template <typename T>
T exchange(T value, int source) {
  const int me = current;
  uint64_t(&slot)[kLanes] = slots[lanes[me].shuffles++ % 2];
  std::memcpy(&slot[me], &value, sizeof(T));
  const unsigned thread = threadIdx.x;
  swapcontext(&lanes[me].context, &scheduler);
  current = me;
  threadIdx.x = thread;
  std::memcpy(&value, &slot[source], sizeof(T));
  return value;
}

template <typename Kernel>
struct Launch {
  Kernel kernel;
  dim3 grid;
  unsigned threads;

  template <typename... Arguments>
  void operator()(const Arguments&... arguments) const {
    gridDim = grid;
    blockDim = dim3(threads);
    body = [&] { kernel(arguments...); };
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y);
        for (unsigned thread = 0; thread < threads; thread += kLanes) {
          run_warp(thread);
        }
      }
    }
  }
};

template <typename Kernel>
Launch<Kernel> launch(Kernel kernel, dim3 grid, unsigned threads) {
  return {kernel, grid, threads};
}

}  // namespace emulated

template <typename T>
T __shfl_sync(unsigned, T value, int source, int width) {
  return emulated::exchange(value, emulated::current / width * width + source % width);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulated::exchange(value, emulated::current ^ distance);
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

#define ASSIGNDETR_LAUNCH(kernel, grid, stream) emulated::launch(kernel, grid, kThreads)
