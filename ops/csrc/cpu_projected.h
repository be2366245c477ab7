// Sampling points that are computed from reference points, offsets and logits, one item at a time, and the way back for
// their gradients. No include guard: cpu_kernels.h includes it once per instruction set, as it does cpu_vector.h.

// Memory of one thread for the samples of one item. What lies behind the samples is outside the map and weighs nothing.
template <typename T>
struct Scratch {
  std::vector<T> where, attend, scale, grad_where, grad_attend;

  explicit Scratch(const Problem<T>& p) {
    if (p.source.reference != nullptr) {
      where.assign(2 * p.padded, T(-9));
      attend.assign(p.padded, T(0));
      scale = p.cell;
      grad_where.resize(2 * p.padded);
      grad_attend.resize(p.padded);
    }
  }
};

template <typename V, typename M>
ASSIGNDETR_INLINE V choose(const M& mask, const V& yes, const V& no) {
  return (V)(((M)yes & mask) | ((M)no & ~mask));
}

template <typename T, int lanes, int distance = lanes / 2>
ASSIGNDETR_INLINE Vector<T, lanes> largest_of_lanes(Vector<T, lanes> a) {
  if constexpr (distance > 0) {
    const Vector<T, lanes> b = shuffle<Swap<distance>, T, lanes>(a, a);
    a = largest_of_lanes<T, lanes, distance / 2>(choose((IntVector<T, lanes>)(a > b), a, b));
  }
  return a;
}

template <typename T, int lanes, int distance = lanes / 2>
ASSIGNDETR_INLINE Vector<T, lanes> sum_of_lanes(Vector<T, lanes> a) {
  if constexpr (distance > 0) {
    a = sum_of_lanes<T, lanes, distance / 2>(a + shuffle<Swap<distance>, T, lanes>(a, a));
  }
  return a;
}

// exp(x) for x <= 0, 0 below the smallest normal number; not a number where x is none.
template <typename T, int lanes>
ASSIGNDETR_INLINE Vector<T, lanes> exp_of_negative(const Vector<T, lanes>& x) {
  using V = Vector<T, lanes>;
  using I = IntVector<T, lanes>;
  if constexpr (sizeof(T) == 4) {
    // 2^k * exp(rest) with |rest| <= ln(2) / 2; the polynomial is that of Cephes' expf, exact to 2e-7.
    const I tiny = (I)(x < T(-87.3)), number = (I)(x == x);
    const V safe = keep(I(~tiny & number), x);
    const I k = __builtin_convertvector(safe * T(1.44269504) - T(0.5), I);
    const V whole = __builtin_convertvector(k, V);
    const V rest = (safe - whole * T(0.693359375)) + whole * T(2.12194440e-4);
    V sum = T(1.9875691500e-4) * rest + T(1.3981999507e-3);
    sum = sum * rest + T(8.3334519073e-3);
    sum = sum * rest + T(4.1665795894e-2);
    sum = sum * rest + T(1.6666665459e-1);
    sum = sum * rest + T(5.0000001201e-1);
    sum = sum * rest * rest + rest + T(1);
    const V power = (V)((k + IntOf<T>(127)) << 23);
    return choose(number, keep(I(~tiny), V(sum * power)), x);
  } else {
    V result{};
    for (int i = 0; i < lanes; ++i) {
      result[i] = std::exp(x[i]);
    }
    return result;
  }
}

// Put the softmax of an item's logits into scratch.attend.
template <typename T>
ASSIGNDETR_INLINE void compute_weights(const Problem<T>& p, const T* logits, Scratch<T>& scratch) {
  constexpr int lanes = kLanes<T>;
  using V = Vector<T, lanes>;
  T* const attend = scratch.attend.data();
  const V nothing = V{} + kLowest<T>;
  V top = nothing;
  for (int64_t s = 0; s < p.samples; s += lanes) {
    V logit;
    if (s + lanes <= p.samples) {
      logit = load<V>(logits + s);
    } else {  // the tensor may end here
      T rest[lanes];
      store(rest, nothing);
      __builtin_memcpy(rest, logits + s, (p.samples - s) * sizeof(T));
      logit = load<V>(rest);
    }
    store(attend + s, logit);
    top = choose((IntVector<T, lanes>)(top > logit), top, logit);
  }
  top = largest_of_lanes<T, lanes>(top);
  V sum{};
  for (int64_t s = 0; s < p.samples; s += lanes) {
    const V part = exp_of_negative<T, lanes>(load<V>(attend + s) - top);
    store(attend + s, part);
    sum += part;
  }
  const V scale = T(1) / sum_of_lanes<T, lanes>(sum);
  for (int64_t s = 0; s < p.samples; s += lanes) {
    store(attend + s, V(load<V>(attend + s) * scale));
  }
}

// Put what the offsets of an item are multiplied by into scratch.scale: from points it is there from the beginning.
template <typename T>
ASSIGNDETR_INLINE void compute_scale(const Problem<T>& p, int64_t item, Scratch<T>& scratch) {
  if (p.source.numbers != 4) {
    return;
  }
  const T* box = p.source.reference + item / p.n.heads * p.levels * 4;
  T* to = scratch.scale.data();
  for (int64_t l = 0; l < p.levels; ++l, box += 4) {
    const T size[2] = {box[2] * p.share, box[3] * p.share};
    for (int64_t point = 0; point < p.n.points; ++point, to += 2) {
      __builtin_memcpy(to, size, sizeof(size));
    }
  }
}

// Put locations and weights of an item into `scratch`.
template <typename T>
ASSIGNDETR_TARGET static void compute_samples(const Problem<T>& p, int64_t item, Scratch<T>& scratch) {
  compute_weights(p, p.source.attend + item * p.samples, scratch);
  compute_scale(p, item, scratch);
  T* const __restrict__ where = scratch.where.data();
  const T* point = p.source.reference + item / p.n.heads * p.levels * p.source.numbers;
  T* to = where;
  for (int64_t l = 0; l < p.levels; ++l, point += p.source.numbers) {
    for (int64_t k = 0; k < p.n.points; ++k, to += 2) {
      __builtin_memcpy(to, point, 2 * sizeof(T));
    }
  }
  const T* const __restrict__ offsets = p.source.where + 2 * item * p.samples;
  const T* const __restrict__ scale = scratch.scale.data();
  for (int64_t i = 0; i < 2 * p.samples; ++i) {
    where[i] += offsets[i] * scale[i];
  }
}

// Turn the gradients of an item's locations and weights, in `scratch`, into those of offsets, logits and reference
// point. Its weights are in `scratch` too.
template <typename T>
ASSIGNDETR_TARGET static void project_gradient(const Problem<T>& p, int64_t item, Scratch<T>& scratch,
                                               const SourceGradient<T>& to) {
  constexpr int lanes = kLanes<T>;
  using V = Vector<T, lanes>;
  const T* const __restrict__ attend = scratch.attend.data();
  const T* const __restrict__ by_weight = scratch.grad_attend.data();
  const T* const __restrict__ by_place = scratch.grad_where.data();
  V sums{};
  for (int64_t s = 0; s < p.samples; s += lanes) {
    sums += load<V>(attend + s) * load<V>(by_weight + s);
  }
  const T mean = sum_of_lanes<T, lanes>(sums)[0];
  T* const __restrict__ by_logit = to.attend + item * p.samples;
  for (int64_t s = 0; s < p.samples; ++s) {
    by_logit[s] = attend[s] * (by_weight[s] - mean);
  }
  compute_scale(p, item, scratch);
  const T* const __restrict__ scale = scratch.scale.data();
  T* const __restrict__ by_offset = to.where + 2 * item * p.samples;
  for (int64_t i = 0; i < 2 * p.samples; ++i) {
    by_offset[i] = by_place[i] * scale[i];
  }
  if (to.reference == nullptr) {
    return;
  }
  const T* const offsets = p.source.where + 2 * item * p.samples;
  const int numbers = p.source.numbers;
  for (int64_t l = 0; l < p.levels; ++l) {
    T sum[4] = {};
    for (int64_t i = 2 * l * p.n.points; i < 2 * (l + 1) * p.n.points; i += 2) {
      sum[0] += by_place[i];
      sum[1] += by_place[i + 1];
      sum[2] += by_place[i] * offsets[i];
      sum[3] += by_place[i + 1] * offsets[i + 1];
    }
    sum[2] *= p.share;
    sum[3] *= p.share;
    __builtin_memcpy(to.reference + (item * p.levels + l) * numbers, sum, numbers * sizeof(T));
  }
}
