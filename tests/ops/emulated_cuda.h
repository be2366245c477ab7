// Enough of CUDA to run kernels on the CPU: one block after the other, its threads as coroutines. The 32 lanes of a warp
// meet at shuffles, the warps of a block at barriers. Lanes that do not all come to the same shuffle are an error, and so
// are warps that do not all come to the same barrier: they would hang or compute nonsense on a GPU.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

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
constexpr size_t kStack = 1 << 16;

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned shuffles, barriers;  // so far
  bool done;
};

inline std::vector<Lane> lanes;  // of a block
inline ucontext_t scheduler;
inline unsigned current;
inline uint64_t slots[2][kLanes];  // two: a lane may be one shuffle ahead of another
inline std::function<void()> body;
inline bool backwards = false;  // the last lanes and warps first: what depends on the order lacks a barrier
inline std::vector<double> shared;  // memory of a block; double: aligned

inline void run_lane() {
  body();
  lanes[current].done = true;
  swapcontext(&lanes[current].context, &scheduler);
}

// Let the other lanes run.
inline void pause() {
  const unsigned me = current;
  swapcontext(&lanes[me].context, &scheduler);
  current = threadIdx.x = me;
}

// Run a warp up to its next barrier, or to its end.
inline void run_warp(unsigned first) {
  const Lane& lane = lanes[first];
  const unsigned before = lane.barriers;
  while (!lane.done && lane.barriers == before) {
    for (unsigned i = 0; i < kLanes; ++i) {
      current = threadIdx.x = first + (backwards ? kLanes - 1 - i : i);
      swapcontext(&scheduler, &lanes[current].context);
    }
    for (unsigned i = first; i < first + kLanes; ++i) {
      if (lanes[i].done != lane.done || lanes[i].shuffles != lane.shuffles || lanes[i].barriers != lane.barriers) {
        throw std::logic_error("the lanes of a warp do not meet at a shuffle");
      }
    }
  }
}

inline void run_block(unsigned threads) {
  lanes.resize(threads);
  for (Lane& lane : lanes) {
    if (!lane.stack) {
      lane.stack.reset(new char[kStack]);
    }
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStack;
    makecontext(&lane.context, run_lane, 0);
    lane.shuffles = lane.barriers = 0;
    lane.done = false;
  }
  while (!lanes[0].done) {
    for (unsigned first = 0; first < threads; first += kLanes) {
      run_warp(backwards ? threads - kLanes - first : first);
    }
    for (const Lane& lane : lanes) {
      if (lane.done != lanes[0].done || lane.barriers != lanes[0].barriers) {
        throw std::logic_error("the warps of a block do not meet at a barrier");
      }
    }
  }
}

// Exchange a value with lane `source` of the warp.
template <typename T>
T exchange(T value, int source) {
  uint64_t(&slot)[kLanes] = slots[lanes[current].shuffles++ % 2];
  std::memcpy(&slot[current % kLanes], &value, sizeof(T));
  pause();
  std::memcpy(&value, &slot[source], sizeof(T));
  return value;
}

template <typename Kernel>
struct Launch {
  Kernel kernel;
  dim3 grid;
  unsigned threads;
  int64_t bytes = 0;  // of shared memory

  template <typename... Arguments>
  void operator()(const Arguments&... arguments) const {
    gridDim = grid;
    blockDim = dim3(threads);
    body = [&] { kernel(arguments...); };
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y);
        // Nothing is left from the block before; what is there differs with the order.
        shared.assign(bytes / sizeof(double) + 1, backwards ? 0.0 : std::nan(""));
        run_block(threads);
      }
    }
  }
};

template <typename Kernel>
Launch<Kernel> launch(Kernel kernel, dim3 grid, unsigned threads, int64_t bytes = 0) {
  return {kernel, grid, threads, bytes};
}

}  // namespace emulated

template <typename T>
T __shfl_sync(unsigned, T value, int source, int width) {
  return emulated::exchange(value, emulated::current % emulated::kLanes / width * width + source % width);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulated::exchange(value, emulated::current % emulated::kLanes ^ distance);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = vote ? 1u << emulated::current % emulated::kLanes : 0;
  for (int distance = 1; distance < emulated::kLanes; distance *= 2) {
    votes |= __shfl_xor_sync(0xffffffffu, votes, distance);
  }
  return votes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline void __syncwarp() { emulated::exchange(0, 0); }

inline void __syncthreads() {
  ++emulated::lanes[emulated::current].barriers;
  emulated::pause();
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
#define ASSIGNDETR_LAUNCH_BLOCKS(kernel, blocks, threads, bytes, stream) \
  emulated::launch(kernel, dim3(static_cast<unsigned>(blocks)), threads, bytes)
#define ASSIGNDETR_SHARED(name) char* const name = reinterpret_cast<char*>(emulated::shared.data())
