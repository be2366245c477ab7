// Compiles the CPU kernels for every instruction set of the platform, and chooses among those of this machine.
#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cpu_problem.h"

#if defined(__GNUC__)
#if defined(__x86_64__)
#define ASSIGNDETR_X86
#define ASSIGNDETR_ISA isa_avx512
#define ASSIGNDETR_TARGET __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
#define ASSIGNDETR_VECTOR_BYTES 64
#include "cpu_kernels.h"
#undef ASSIGNDETR_ISA
#undef ASSIGNDETR_TARGET
#undef ASSIGNDETR_VECTOR_BYTES
#undef ASSIGNDETR_INLINE

#define ASSIGNDETR_ISA isa_avx2
#define ASSIGNDETR_TARGET __attribute__((target("avx2,fma")))
#define ASSIGNDETR_VECTOR_BYTES 32
#include "cpu_kernels.h"
#undef ASSIGNDETR_ISA
#undef ASSIGNDETR_TARGET
#undef ASSIGNDETR_VECTOR_BYTES
#undef ASSIGNDETR_INLINE
#endif

// SSE2, NEON, or whatever the compiler makes of 16 bytes.
#define ASSIGNDETR_ISA isa_portable
#define ASSIGNDETR_TARGET
#define ASSIGNDETR_VECTOR_BYTES 16
#include "cpu_kernels.h"
#endif  // other compilers have no such vectors: the plain loops of ms_deform_attn.cpp do everything there

namespace assigndetr {

constexpr const char* kIsaVariable = "ASSIGNDETR_CPU_ISA";

// The instruction sets of this machine that there are kernels for, the fastest first.
inline const std::vector<std::string>& cpu_isas() {
  static const std::vector<std::string> found = [] {
    std::vector<std::string> names;
#ifdef ASSIGNDETR_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
      names.emplace_back("avx512");
    }
    if (avx2) {
      names.emplace_back("avx2");
    }
#endif
    names.emplace_back("portable");
    return names;
  }();
  return found;
}

// The one to use: the fastest, or what the environment variable asks for.
inline std::string chosen_isa() {
  const auto& isas = cpu_isas();
  const char* const asked = std::getenv(kIsaVariable);
  if (asked == nullptr || *asked == '\0') {
    return isas.front();
  }
  std::string allowed;
  for (const auto& isa : isas) {
    if (isa == asked) {
      return isa;
    }
    allowed += (allowed.empty() ? "" : ", ") + isa;
  }
  TORCH_CHECK_VALUE(false, kIsaVariable, " is '", asked, "'; this machine has ", allowed);
}

#if defined(__GNUC__)
// Widths of published models in float32 have their own kernels; the others share one that puts powers of two together.
#define ASSIGNDETR_BY_WIDTH(isa)          \
  if constexpr (sizeof(T) == 4) {         \
    switch (channels) {                   \
      case 8:                             \
        return isa::kernels<T, 8>();      \
      case 16:                            \
        return isa::kernels<T, 16>();     \
      case 32:                            \
        return isa::kernels<T, 32>();     \
      case 64:                            \
        return isa::kernels<T, 64>();     \
    }                                     \
  }                                       \
  return isa::kernels<T, 0>();

template <typename T>
Kernels<T> choose_kernels(const std::string& isa, int64_t channels) {
#ifdef ASSIGNDETR_X86
  if (isa == "avx512") {
    ASSIGNDETR_BY_WIDTH(isa_avx512)
  }
  if (isa == "avx2") {
    ASSIGNDETR_BY_WIDTH(isa_avx2)
  }
#endif
  ASSIGNDETR_BY_WIDTH(isa_portable)
}
#undef ASSIGNDETR_BY_WIDTH
#else
template <typename T>
Kernels<T> choose_kernels(const std::string&, int64_t) {
  return {nullptr, nullptr};
}
#endif

}  // namespace assigndetr
