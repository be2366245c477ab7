// Vectors of the compiler (GCC, Clang) with the few operations the CPU kernels need. No include guard: cpu_kernels.h
// includes it once per instruction set, in a namespace of its own. Every function carries the target attribute, because
// compilers cut wide vectors into narrow ones in functions without it, before they inline them.

#define ASSIGNDETR_INLINE ASSIGNDETR_TARGET static inline __attribute__((always_inline))

template <typename T, int lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * lanes)));
};
template <typename T, int lanes>
using Vector = typename VectorOf<T, lanes>::type;
template <typename T, int lanes>
using IntVector = Vector<IntOf<T>, lanes>;

template <typename T>
constexpr int kLanes = ASSIGNDETR_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <typename V, typename T>
ASSIGNDETR_INLINE V load(const T* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof(V));
  return vector;
}

template <typename V, typename T>
ASSIGNDETR_INLINE void store(T* to, const V& vector) {
  __builtin_memcpy(to, &vector, sizeof(V));
}

// Zero where the mask is not set.
template <typename V, typename M>
ASSIGNDETR_INLINE V keep(const M& mask, const V& vector) {
  return (V)((M)vector & mask);
}

// Shuffle two vectors; lane i of the result is lane Pattern::at(lanes, i) of them, `lanes` and more mean the second.
template <typename Pattern, typename T, int lanes, int... i>
ASSIGNDETR_INLINE Vector<T, lanes> shuffle(const Vector<T, lanes>& a, const Vector<T, lanes>& b,
                                           std::integer_sequence<int, i...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Pattern::at(lanes, i)...);
#else
  return __builtin_shuffle(a, b, IntVector<T, lanes>{Pattern::at(lanes, i)...});
#endif
}

template <typename Pattern, typename T, int lanes>
ASSIGNDETR_INLINE Vector<T, lanes> shuffle(const Vector<T, lanes>& a, const Vector<T, lanes>& b) {
  return shuffle<Pattern, T, lanes>(a, b, std::make_integer_sequence<int, lanes>());
}

// Every second lane of two vectors, beginning with `first`.
template <int first>
struct EverySecond {
  static constexpr int at(int, int i) { return 2 * i + first; }
};

// Of groups of `size` lanes, the lower (half 0) or upper (half 1) halves: those of the first vector, then the second's.
template <int size, int half>
struct Halves {
  static constexpr int at(int lanes, int i) {
    const int from = i < lanes / 2 ? 0 : lanes, j = i % (lanes / 2);
    return from + j / (size / 2) * size + half * (size / 2) + j % (size / 2);
  }
};

// The lanes of two vectors by turns: half 0 is the first half of that, half 1 the second.
template <int half>
struct ByTurns {
  static constexpr int at(int lanes, int i) { return half * (lanes / 2) + i / 2 + i % 2 * lanes; }
};

template <int distance>
struct Swap {
  static constexpr int at(int, int i) { return i ^ distance; }
};

template <int step>
struct EveryNth {
  static constexpr int at(int lanes, int i) { return i * step % lanes; }
};

template <int size, typename T, int lanes>
ASSIGNDETR_INLINE Vector<T, lanes> add_halves(const Vector<T, lanes>& a, const Vector<T, lanes>& b) {
  return shuffle<Halves<size, 0>, T, lanes>(a, b) + shuffle<Halves<size, 1>, T, lanes>(a, b);
}

// Sum each of four vectors over its lanes, and put the sums into to[0..3] or, if `add` is set, add them there.
template <typename T, int lanes>
ASSIGNDETR_INLINE void put_sums(const Vector<T, lanes>& a, const Vector<T, lanes>& b, const Vector<T, lanes>& c,
                                const Vector<T, lanes>& d, bool add, T* to) {
  using Four = Vector<T, 4>;
  Four four;
  if constexpr (lanes >= 4) {
    Vector<T, lanes> sums = add_halves<lanes / 2, T, lanes>(add_halves<lanes, T, lanes>(a, b),
                                                            add_halves<lanes, T, lanes>(c, d));
    if constexpr (lanes >= 16) {
      sums += shuffle<Swap<2>, T, lanes>(sums, sums);
    }
    if constexpr (lanes >= 8) {
      sums += shuffle<Swap<1>, T, lanes>(sums, sums);
      sums = shuffle<EveryNth<lanes / 4>, T, lanes>(sums, sums);
    }
    __builtin_memcpy(&four, &sums, sizeof(four));
  } else {
    four = Four{a[0], b[0], c[0], d[0]};
    for (int i = 1; i < lanes; ++i) {
      four += Four{a[i], b[i], c[i], d[i]};
    }
  }
  store(to, add ? Four(load<Four>(to) + four) : four);
}
