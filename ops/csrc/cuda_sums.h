// How the backward kernels add to the gradient of the values: two classes with the same functions.
#pragma once

#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

template <typename T, int count>
ASSIGNDETR_HD void widen(const Vec<T, count>& vector, float (&numbers)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    numbers[i] = static_cast<float>(vector.at[i]);
  }
}

// bfloat16 is the upper half of float32. Taken out of a word in pairs each costs one instruction; alone, odd ones cost
// two.
template <int count>
ASSIGNDETR_HD void widen(const Vec<c10::BFloat16, count>& vector, float (&numbers)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 2) {
    uint32_t pair;
    std::memcpy(&pair, vector.at + i, sizeof(pair));
    const uint32_t bits[2] = {pair << 16, pair & 0xffff0000u};
    std::memcpy(numbers + i, bits, sizeof(bits));
  }
}

// Where a cell begins; `bytes` lie between two cells. In bytes it is one multiplication, of elements it would be more.
template <typename T>
ASSIGNDETR_HD T* cell_at(T* first, unsigned cell, unsigned bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + static_cast<uint64_t>(cell) * bytes);
}

using Fixed = unsigned long long;  // two's complement; the type of the atomic addition

// Additions in any order: fast, other last places from run to run.
template <typename T>
struct PlainSums {
  using Number = T;
  static constexpr bool by_four = sizeof(T) == 4 && ASSIGNDETR_ADDS_FOUR;
  Number* to;

  __device__ __forceinline__ T scale() const { return T(1); }
  static __device__ __forceinline__ void add(Number* to, T number, T) { atomicAdd(to, number); }

  static __device__ __forceinline__ void add_four(Number* to, const Vec<float, 4>& numbers) {
#if defined(__CUDA_ARCH__) && ASSIGNDETR_ADDS_FOUR
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "f"(numbers.at[0]), "f"(numbers.at[1]), "f"(numbers.at[2]), "f"(numbers.at[3])
                 : "memory");
#else
    for (int i = 0; i < 4; ++i) {
      atomicAdd(to + i, numbers.at[i]);
    }
#endif
  }
};

// Additions in fixed point: the same bits in every run. fixed_to_float() makes numbers of the sums.
template <typename T>
struct FixedSums {
  using Number = Fixed;
  static constexpr bool by_four = false;
  Number* to;
  const T *largest_grad, *largest_weight;  // of the call, on the device
  int log_count;

  __device__ __forceinline__ T scale() const {
    return std::ldexp(T(1), fixed_exponent(*largest_grad, *largest_weight, log_count));
  }
  static __device__ __forceinline__ void add(Number* to, T number, T scale) {
    atomicAdd(to, static_cast<Fixed>(llrint(number * scale)));
  }
  static __device__ __forceinline__ void add_four(Number*, const Vec<float, 4>&) {}
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
