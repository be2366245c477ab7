// How the backward kernels add to the gradient of the values: two classes with the same functions.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_layout.h"

// Can one instruction add four float32 to memory? From architecture 9.0 on, if the compiler knows it (CUDA 12.1).
#ifndef ASSIGNDETR_ADDS_FOUR  // tests on the CPU define it
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
#define ASSIGNDETR_ADDS_FOUR 1
#else
#define ASSIGNDETR_ADDS_FOUR 0
#endif
#endif

namespace assigndetr {

// Four numbers side by side, or eight: one access to memory.
template <typename T, int count>
struct alignas(sizeof(T) * count) Vec {
  T at[count];
};

template <typename T, int count>
ASSIGNDETR_HD Vec<T, count> load(const T* from) {
  return *reinterpret_cast<const Vec<T, count>*>(from);
}

using Fixed = unsigned long long;  // two's complement; the type of the atomic addition

// Additions in any order: fast, other last places from run to run.
template <typename T>
struct PlainSums {
  static constexpr bool by_four = sizeof(T) == 4 && ASSIGNDETR_ADDS_FOUR;
  T* to;

  __device__ __forceinline__ T scale() const { return T(1); }
  __device__ __forceinline__ void add(int64_t index, T number, T) const { atomicAdd(to + index, number); }

  __device__ __forceinline__ void add_four(int64_t index, const Vec<float, 4>& numbers) const {
#if defined(__CUDA_ARCH__) && ASSIGNDETR_ADDS_FOUR
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to + index)),
                 "f"(numbers.at[0]), "f"(numbers.at[1]), "f"(numbers.at[2]), "f"(numbers.at[3])
                 : "memory");
#else
    for (int i = 0; i < 4; ++i) {
      atomicAdd(to + index + i, numbers.at[i]);
    }
#endif
  }
};

// Additions in fixed point: the same bits in every run. fixed_to_float() makes numbers of the sums.
template <typename T>
struct FixedSums {
  static constexpr bool by_four = false;
  Fixed* to;
  const T *largest_grad, *largest_weight;  // of the call, on the device
  int log_count;

  __device__ __forceinline__ T scale() const {
    return std::ldexp(T(1), fixed_exponent(*largest_grad, *largest_weight, log_count));
  }
  __device__ __forceinline__ void add(int64_t index, T number, T scale) const {
    atomicAdd(to + index, static_cast<Fixed>(llrint(number * scale)));
  }
  __device__ __forceinline__ void add_four(int64_t, const Vec<float, 4>&) const {}
};

// One thread per number. If a gradient was not finite, no sum means anything.
template <typename T>
__global__ void __launch_bounds__(kThreads) fixed_to_float(const FixedSums<T> sums, int64_t count, T* result) {
  const T grad = *sums.largest_grad, weight = *sums.largest_weight;
  const T back = std::ldexp(T(1), -fixed_exponent(grad, weight, sums.log_count));
  const T nothing = (grad - grad) + (weight - weight);  // 0, or not a number
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const T sum = static_cast<T>(static_cast<long long>(sums.to[i]));
    result[i] = sum * back + nothing;
  }
}

}  // namespace assigndetr
