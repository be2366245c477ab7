// Loops that become vector code, once for every instruction set; which one runs is decided when the library is loaded.
// Other compilers and systems use what every processor of theirs has.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define ASSIGNDETR_VECTOR_CODE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ASSIGNDETR_VECTOR_CODE
#endif
#if defined(_MSC_VER)
#define ASSIGNDETR_INLINE __forceinline
#else
#define ASSIGNDETR_INLINE inline __attribute__((always_inline))
#endif
