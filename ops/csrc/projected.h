// Where samples are and what they weigh: read from memory, or computed where they are used from reference points,
// offsets and logits, so that neither locations nor softmaxed weights need memory. Shared by CPU and CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "bilinear.h"

namespace assigndetr {

// What a call brings in. Samples are the levels x points of one (image, query, head), one item after the other.
template <typename T>
struct Source {
  const T* where;      // two numbers per sample: its location or, if there are reference points, its offset from one
  const T* attend;     // one number per sample: its weight or, if there are reference points, its logit
  const T* reference;  // (image, query, level, numbers), or null
  int numbers;         // 2: points x, y; 4: boxes cx, cy, w, h
};

// The gradients of the same tensors. That of the reference points is written once per head, as (image, query, head,
// level, numbers), for heads are computed by different threads; null if nobody wants it.
template <typename T>
struct SourceGradient {
  T* where;
  T* attend;
  T* reference;
};

// A location is (x, y) + offset * scale.
template <typename T>
struct Anchor {
  T x, y, scale_x, scale_y;
};

// Offsets from points count cells of the level; offsets from boxes count halves of the box, divided by the points.
template <typename T>
ASSIGNDETR_HD Anchor<T> anchor_at(const T* reference, int numbers, T cell_x, T cell_y, T share) {
  if (numbers == 4) {
    return {reference[0], reference[1], reference[2] * share, reference[3] * share};
  }
  return {reference[0], reference[1], cell_x, cell_y};
}

template <typename T>
ASSIGNDETR_HD T box_share(int64_t points) {
  return T(0.5) / static_cast<T>(points);
}

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

// The softmax over the samples of an item: a sample weighs exp(logit - top) * scale.
template <typename T>
struct Softmax {
  T top, scale;

  template <typename Logit>
  ASSIGNDETR_HD T weight(Logit logit) const {
    return std::exp(static_cast<T>(logit) - top) * scale;
  }
};

// One thread goes over all logits.
template <typename T, typename Logit>
ASSIGNDETR_HD Softmax<T> softmax_of(const Logit* logits, int64_t samples) {
  Softmax<T> found{kLowest<T>, T(0)};
  for (int64_t s = 0; s < samples; ++s) {
    const T logit = static_cast<T>(logits[s]);
    found.top = logit > found.top ? logit : found.top;
  }
  T sum = 0;
  for (int64_t s = 0; s < samples; ++s) {
    sum += std::exp(static_cast<T>(logits[s]) - found.top);
  }
  found.scale = T(1) / sum;
  return found;
}

}  // namespace assigndetr
