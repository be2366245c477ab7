// The CPU kernels, written once and compiled once per instruction set. No include guard: ms_deform_attn.cpp includes
// this file with
//   ASSIGNDETR_ISA           the namespace,
//   ASSIGNDETR_TARGET        the function attribute that allows the instructions,
//   ASSIGNDETR_VECTOR_BYTES  the size of a vector register.
// Lambdas do not inherit the attribute, hence there are none.

namespace assigndetr {
namespace ASSIGNDETR_ISA {

#include "cpu_vector.h"

#include "cpu_projected.h"

// Where as many samples as fit into a vector lie, of one query and head.
template <typename T>
struct alignas(64) Block {
  static constexpr int lanes = kLanes<T>;

  // Per corner (upper left, upper right, lower left, lower right):
  T weight[4][lanes];         // attention weight times bilinear weight, 0 outside the map
  IntOf<T> place[4][lanes];   // where the corner's channels begin, clamped to the map
  IntOf<T> inside[4][lanes];  // all bits set if the corner is on the map, else none
  IntOf<T> seen[lanes];       // the same: does the sample see any cell
  T right[lanes];             // distance from the left corners, in cells
  T low[lanes];               // distance from the upper corners
  T attention[lanes];
  T dots[4 * lanes];  // the products of the output's gradient with the corners, the four of a sample side by side
};

template <typename T>
using Samples = std::vector<Block<T>>;

// Fill the samples of `item` = (image, query, head), a vector of samples at a time. See locate() in bilinear.h.
template <typename T, bool for_backward>
ASSIGNDETR_INLINE void locate_all(const Problem<T>& p, int64_t item, int64_t cell_stride, Scratch<T>& scratch,
                                  Samples<T>& to) {
  constexpr int lanes = kLanes<T>;
  using V = Vector<T, lanes>;
  using I = IntVector<T, lanes>;
  using Int = IntOf<T>;
  const bool computed = p.source.reference != nullptr;
  if (computed) {
    compute_samples(p, item, scratch);
  }
  const T* const first_place = computed ? scratch.where.data() : p.source.where + 2 * item * p.samples;
  const T* const first_weight = computed ? scratch.attend.data() : p.source.attend + item * p.samples;
  for (int64_t s = 0; s < p.samples; s += lanes) {
    Block<T>& out = to[s / lanes];
    const T *at = first_place + 2 * s, *attend = first_weight + s;
    T rest[3 * lanes];
    if (s + lanes > p.samples && !computed) {  // the tensors may end here
      const int64_t count = p.samples - s;
      for (int64_t i = 0; i < lanes; ++i) {
        rest[2 * i] = i < count ? at[2 * i] : T(0);
        rest[2 * i + 1] = i < count ? at[2 * i + 1] : T(0);
        rest[2 * lanes + i] = i < count ? attend[i] : T(0);
      }
      at = rest;
      attend = rest + 2 * lanes;
    }
    const V first = load<V>(at), second = load<V>(at + lanes), attention = load<V>(attend);
    const V width = load<V>(&p.width[s]), height = load<V>(&p.height[s]);
    const I columns = load<I>(&p.columns[s]), rows = load<I>(&p.rows[s]);
    V px = shuffle<EverySecond<0>, T, lanes>(first, second) * width - T(0.5);
    V py = shuffle<EverySecond<1>, T, lanes>(first, second) * height - T(0.5);
    // Comparisons give -1 for true, and false for what is not a number.
    const I seen = (I)(px > T(-1)) & (I)(py > T(-1)) & (I)(px < width) & (I)(py < height);
    px = keep(seen, px);
    py = keep(seen, py);
    I x = __builtin_convertvector(px, I), y = __builtin_convertvector(py, I);  // towards 0; wanted: down
    x += (I)(__builtin_convertvector(x, V) > px);
    y += (I)(__builtin_convertvector(y, V) > py);
    const V right = px - __builtin_convertvector(x, V), low = py - __builtin_convertvector(y, V);
    const I left_in = seen & (I)(x >= Int(0)), right_in = seen & (I)(x + Int(1) < columns);
    const I up_in = (I)(y >= Int(0)), low_in = (I)(y + Int(1) < rows);
    const I left_x = x & (I)(x >= Int(0)), right_x = x + Int(1) + (I)(x + Int(1) >= columns);
    const I start = load<I>(&p.start[s]), stride = I{} + static_cast<Int>(cell_stride);
    const I upper = start + (y & (I)(y >= Int(0))) * columns;
    const I lower = start + (y + Int(1) + (I)(y + Int(1) >= rows)) * columns;
    store(out.place[0], I((upper + left_x) * stride));
    store(out.place[1], I((upper + right_x) * stride));
    store(out.place[2], I((lower + left_x) * stride));
    store(out.place[3], I((lower + right_x) * stride));
    const V left = T(1) - right, a_low = attention * low, a_up = attention * (T(1) - low);
    store(out.weight[0], keep(I(left_in & up_in), V(a_up * left)));
    store(out.weight[1], keep(I(right_in & up_in), V(a_up * right)));
    store(out.weight[2], keep(I(left_in & low_in), V(a_low * left)));
    store(out.weight[3], keep(I(right_in & low_in), V(a_low * right)));
    store(out.seen, seen);
    if constexpr (for_backward) {
      store(out.inside[0], I(left_in & up_in));
      store(out.inside[1], I(right_in & up_in));
      store(out.inside[2], I(left_in & low_in));
      store(out.inside[3], I(right_in & low_in));
      store(out.right, right);
      store(out.low, low);
      store(out.attention, attention);
    }
  }
}

// Ask for `count` numbers before they are needed.
template <typename T>
ASSIGNDETR_INLINE void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) {
    __builtin_prefetch(from + i);
  }
}

// Ask for what an item is computed from; in tiles, items do not follow each other in memory.
template <typename T>
ASSIGNDETR_INLINE void prefetch_item(const Problem<T>& p, int64_t item, const T* grad_output) {
  prefetch(p.source.where + 2 * item * p.samples, 2 * p.samples);
  prefetch(p.source.attend + item * p.samples, p.samples);
  if (grad_output != nullptr) {
    prefetch(grad_output + item * p.n.channels, p.n.channels);
  }
}

// Ask for the cells of an item.
template <typename T>
ASSIGNDETR_INLINE void prefetch_cells(const Samples<T>& samples, int64_t count, const T* value, int64_t channels) {
  for (const Block<T>& at : samples) {
    for (int i = 0; i < kLanes<T> && i < count; ++i) {
      for (int k = 0; k < 4; ++k) {
        prefetch(value + at.place[k][i], channels);
      }
    }
    count -= kLanes<T>;
  }
}

// Sum `width` channels of the samples, in registers.
template <typename T, int width>
ASSIGNDETR_INLINE void sum_samples(const Samples<T>& samples, int64_t left, const T* value, T* output) {
  constexpr int lanes = width < kLanes<T> ? width : kLanes<T>, count = width / lanes;
  // An addition waits for the one before: about eight sums that do not depend on each other keep the core busy.
  constexpr int chains = count >= 8 ? 1 : (count >= 4 ? 2 : 4);
  using V = Vector<T, lanes>;
  V sums[chains][count] = {};
  for (const Block<T>& at : samples) {
    for (int i = 0; i < kLanes<T> && i < left; ++i) {
      if (!at.seen[i]) {
        continue;
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const T weight = at.weight[k][i];
        const T* const cell = value + at.place[k][i];
#pragma GCC unroll 16
        for (int v = 0; v < count; ++v) {
          sums[k % chains][v] += weight * load<V>(cell + v * lanes);
        }
      }
    }
    left -= kLanes<T>;
  }
#pragma GCC unroll 16
  for (int v = 0; v < count; ++v) {
    V sum = sums[0][v];
#pragma GCC unroll 4
    for (int chain = 1; chain < chains; ++chain) {
      sum += sums[chain][v];
    }
    store(output + v * lanes, sum);
  }
}

// All channels of a head: `width` of them or, if that is 0, any number as a sum of powers of two.
template <typename T, int width>
ASSIGNDETR_INLINE void sum_channels(const Samples<T>& samples, int64_t count, const T* value, T* output,
                                    int64_t channels) {
  if constexpr (width > 0) {
    sum_samples<T, width>(samples, count, value, output);
  } else {
    int64_t c = 0;
    for (; c + 32 <= channels; c += 32) {
      sum_samples<T, 32>(samples, count, value + c, output + c);
    }
    for (; c + 8 <= channels; c += 8) {
      sum_samples<T, 8>(samples, count, value + c, output + c);
    }
    for (; c < channels; ++c) {
      sum_samples<T, 1>(samples, count, value + c, output + c);
    }
  }
}

// For `width` channels: add to the gradient of the cells, and put the products with the cells into `dots` or add them.
template <typename T, int width>
ASSIGNDETR_INLINE void spread_gradient(Samples<T>& samples, int64_t left, const T* value, const T* grad_output,
                                       T* grad_value, bool add) {
  constexpr int lanes = width < kLanes<T> ? width : kLanes<T>, count = width / lanes;
  using V = Vector<T, lanes>;
  V grad[count];
#pragma GCC unroll 16
  for (int v = 0; v < count; ++v) {
    grad[v] = load<V>(grad_output + v * lanes);
  }
  for (Block<T>& at : samples) {
    for (int i = 0; i < kLanes<T> && i < left; ++i) {
      if (!at.seen[i]) {
        continue;
      }
      V dots[4] = {};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const T weight = at.weight[k][i];
        const T* const cell = value + at.place[k][i];
        T* const grad_cell = grad_value + at.place[k][i];
#pragma GCC unroll 16
        for (int v = 0; v < count; ++v) {
          dots[k] += grad[v] * load<V>(cell + v * lanes);
          store(grad_cell + v * lanes, V(load<V>(grad_cell + v * lanes) + weight * grad[v]));
        }
      }
      put_sums<T, lanes>(dots[0], dots[1], dots[2], dots[3], add, at.dots + 4 * i);
    }
    left -= kLanes<T>;
  }
}

// All channels of a head, as in sum_channels.
template <typename T, int width>
ASSIGNDETR_INLINE void spread_channels(Samples<T>& samples, int64_t count, const T* value, const T* grad_output,
                                       T* grad_value, int64_t channels) {
  if constexpr (width > 0) {
    spread_gradient<T, width>(samples, count, value, grad_output, grad_value, false);
  } else {
    int64_t c = 0;
    for (; c + 32 <= channels; c += 32) {
      spread_gradient<T, 32>(samples, count, value + c, grad_output + c, grad_value + c, c > 0);
    }
    for (; c + 8 <= channels; c += 8) {
      spread_gradient<T, 8>(samples, count, value + c, grad_output + c, grad_value + c, c > 0);
    }
    for (; c < channels; ++c) {
      spread_gradient<T, 1>(samples, count, value + c, grad_output + c, grad_value + c, c > 0);
    }
  }
}

// Write the gradients of the locations and weights of one item, or of what they are computed from, from its `dots`, a
// vector of samples at a time.
template <typename T>
ASSIGNDETR_INLINE void finish_gradient(const Problem<T>& p, int64_t item, const Samples<T>& samples,
                                       Scratch<T>& scratch, const SourceGradient<T>& to) {
  constexpr int lanes = kLanes<T>;
  using V = Vector<T, lanes>;
  using I = IntVector<T, lanes>;
  const bool computed = p.source.reference != nullptr;
  T* const first_place = computed ? scratch.grad_where.data() : to.where + 2 * item * p.samples;
  T* const first_weight = computed ? scratch.grad_attend.data() : to.attend + item * p.samples;
  for (int64_t s = 0; s < p.samples; s += lanes) {
    const Block<T>& at = samples[s / lanes];
    const V first = load<V>(at.dots), second = load<V>(at.dots + lanes);
    const V third = load<V>(at.dots + 2 * lanes), fourth = load<V>(at.dots + 3 * lanes);
    const V left_1 = shuffle<EverySecond<0>, T, lanes>(first, second);
    const V left_2 = shuffle<EverySecond<0>, T, lanes>(third, fourth);
    const V right_1 = shuffle<EverySecond<1>, T, lanes>(first, second);
    const V right_2 = shuffle<EverySecond<1>, T, lanes>(third, fourth);
    const V up_left = keep(load<I>(at.inside[0]), shuffle<EverySecond<0>, T, lanes>(left_1, left_2));
    const V up_right = keep(load<I>(at.inside[1]), shuffle<EverySecond<0>, T, lanes>(right_1, right_2));
    const V low_left = keep(load<I>(at.inside[2]), shuffle<EverySecond<1>, T, lanes>(left_1, left_2));
    const V low_right = keep(load<I>(at.inside[3]), shuffle<EverySecond<1>, T, lanes>(right_1, right_2));
    const V right = load<V>(at.right), low = load<V>(at.low), attention = load<V>(at.attention);
    const V upper = up_left * (T(1) - right) + up_right * right;
    const V lower = low_left * (T(1) - right) + low_right * right;
    const V to_right = (up_right - up_left) * (T(1) - low) + (low_right - low_left) * low;
    const V by_weight = upper * (T(1) - low) + lower * low;
    const V by_x = attention * load<V>(&p.width[s]) * to_right;
    const V by_y = attention * load<V>(&p.height[s]) * (lower - upper);
    const V xy_1 = shuffle<ByTurns<0>, T, lanes>(by_x, by_y), xy_2 = shuffle<ByTurns<1>, T, lanes>(by_x, by_y);
    T *const to_weights = first_weight + s, *const to_places = first_place + 2 * s;
    if (s + lanes <= p.samples || computed) {
      store(to_weights, by_weight);
      store(to_places, xy_1);
      store(to_places + lanes, xy_2);
    } else {  // the tensors may end here
      T rest[3 * lanes];
      store(rest, by_weight);
      store(rest + lanes, xy_1);
      store(rest + 2 * lanes, xy_2);
      __builtin_memcpy(to_weights, rest, (p.samples - s) * sizeof(T));
      __builtin_memcpy(to_places, rest + lanes, 2 * (p.samples - s) * sizeof(T));
    }
    if (computed) {
      store(&scratch.attend[s], attention);  // the weights of a later item stand there by now
    }
  }
  if (computed) {
    project_gradient(p, item, scratch, to);
  }
}

constexpr int kAhead = 4;  // items between asking for what an item is computed from and computing it

// Goes over the queries and heads of a part, heads first.
template <typename T>
struct Walk {
  const Problem<T>& p;
  const Part& part;
  int64_t position, head;

  ASSIGNDETR_TARGET Walk(const Problem<T>& p, const Part& part)
      : p(p), part(part), position(part.first_query), head(part.first_head) {}
  ASSIGNDETR_TARGET bool done() const { return position >= part.last_query; }
  ASSIGNDETR_TARGET void next() {
    if (++head == part.last_head) {
      head = part.first_head;
      ++position;
    }
  }
  ASSIGNDETR_TARGET int64_t item() const {
    const int64_t query = p.order.empty() ? position : p.order[position];
    return (part.image * p.n.queries + query) * p.n.heads + head;
  }
};

template <typename T, int width>
ASSIGNDETR_TARGET void forward(const Problem<T>& p, const Part& part, const Layout& layout, const T* value, T* output) {
  const int64_t channels = width > 0 ? width : p.n.channels;
  Samples<T> first(p.padded / kLanes<T>), second(p.padded / kLanes<T>), *now = &first, *then = &second;
  Scratch<T> scratch(p);
  Walk<T> walk(p, part), ahead(p, part);
  for (int i = 0; i < kAhead && !ahead.done(); ++i) {
    ahead.next();
  }
  if (!walk.done()) {
    locate_all<T, false>(p, walk.item(), layout.cell_stride, scratch, *now);
  }
  while (!walk.done()) {
    const int64_t item = walk.item();
    const T* const from = value + walk.head * layout.head_stride;
    walk.next();
    if (!ahead.done()) {
      prefetch_item<T>(p, ahead.item(), nullptr);
      ahead.next();
    }
    if (!walk.done()) {
      locate_all<T, false>(p, walk.item(), layout.cell_stride, scratch, *then);
      prefetch_cells(*then, p.samples, value + walk.head * layout.head_stride, channels);
    }
    T* const to = output + item * channels;
    sum_channels<T, width>(*now, p.samples, from, to, channels);
    std::swap(now, then);
  }
}

template <typename T, int width>
ASSIGNDETR_TARGET void backward(const Problem<T>& p, const Part& part, const Layout& layout, const T* value,
                                const T* grad_output, T* grad_value, const SourceGradient<T>& grad_source) {
  const int64_t channels = width > 0 ? width : p.n.channels;
  Samples<T> first(p.padded / kLanes<T>), second(p.padded / kLanes<T>), *now = &first, *then = &second;
  Scratch<T> scratch(p);
  Walk<T> walk(p, part), ahead(p, part);
  for (int i = 0; i < kAhead && !ahead.done(); ++i) {
    ahead.next();
  }
  if (!walk.done()) {
    locate_all<T, true>(p, walk.item(), layout.cell_stride, scratch, *now);
  }
  while (!walk.done()) {
    const int64_t item = walk.item(), head_begin = walk.head * layout.head_stride;
    const T *const from = value + head_begin, *const grad = grad_output + item * channels;
    T* const to = grad_value + head_begin;
    walk.next();
    if (!ahead.done()) {
      prefetch_item(p, ahead.item(), grad_output);
      ahead.next();
    }
    if (!walk.done()) {
      const int64_t next_head = walk.head * layout.head_stride;
      locate_all<T, true>(p, walk.item(), layout.cell_stride, scratch, *then);
      prefetch_cells(*then, p.samples, value + next_head, channels);
      prefetch_cells(*then, p.samples, grad_value + next_head, channels);
    }
    spread_channels<T, width>(*now, p.samples, from, grad, to, channels);
    finish_gradient(p, item, *now, scratch, grad_source);
    std::swap(now, then);
  }
}

template <typename T, int width>
Kernels<T> kernels() {
  return {forward<T, width>, backward<T, width>};
}

}  // namespace ASSIGNDETR_ISA
}  // namespace assigndetr
