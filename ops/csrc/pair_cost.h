// What it costs to give a target to a slot: focal class cost, L1 and generalised IoU (DETR, section 3.1;
// Deformable-DETR). In float32, in the order of operations of models/assign/costs.py. Shared by CPU and CUDA; nothing
// of PyTorch in here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bilinear.h"

namespace assigndetr {

struct CostWeights {
  float classes, l1, giou;
  float giou_eps;  // added to the denominators of the GIoU
};

struct CentreBox {
  float x, y, w, h;
};

// Which numbers belong to a pair. Strides count numbers.
struct CostSizes {
  int64_t targets, layers, batch, slots, classes;
  int64_t logit_layer, logit_image, logit_slot, logit_class;
  int64_t box_layer, box_image, box_slot, box_number;
};

// exp and log that compilers turn into vector code, within some units of the last place of the true ones (polynomials
// of Cephes). Of NaN exp is NaN and log any number, which class_cost() multiplies by NaN.
struct VectorMath {
  static ASSIGNDETR_HD float exp(float x) {
    x = x > 88.3762626647950f ? 88.3762626647950f : x;
    x = x < -87.3f ? -87.3f : x;
    const float turns = x == x ? x * 1.44269504088896341f : 0.0f;  // no integer stands for NaN
    const int32_t whole = static_cast<int32_t>(turns + (turns < 0 ? -0.5f : 0.5f));
    const float n = static_cast<float>(whole);
    x = x - n * 0.693359375f;
    x = x - n * -2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    return y * from_bits((static_cast<uint32_t>(whole) + 127u) << 23);
  }

  // Of a positive normal number.
  static ASSIGNDETR_HD float log(float x) {
    const uint32_t bits = to_bits(x);
    const int32_t exponent = static_cast<int32_t>(bits >> 23) - 126;
    const float part = from_bits((bits & 0x7fffffu) | 0x3f000000u);  // 0.5 to 1
    const float twice = part < 0.707106781186547524f ? 1.0f : 0.0f;  // no branch: it must not keep a vector together
    const float e = static_cast<float>(exponent) - twice;
    const float m = (part + part * twice) - 1.0f;
    const float z = m * m;
    float y = 7.0376836292e-2f;
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z;
    y = y + e * -2.12194440e-4f;
    y = y - 0.5f * z;
    return m + y + e * 0.693359375f;
  }

 private:
  static ASSIGNDETR_HD uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
  }
  static ASSIGNDETR_HD float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
};

struct LibraryMath {
  static ASSIGNDETR_HD float exp(float x) { return std::exp(x); }
  static ASSIGNDETR_HD float log(float x) { return std::log(x); }
};

// The numbers are fixed in the matcher, independent of the focal loss's own alpha (published).
template <typename Math>
ASSIGNDETR_HD float class_cost(float logit) {
  constexpr float alpha = 0.25f, eps = 1e-8f;
  const float p = 1.0f / (1.0f + Math::exp(-logit)), rest = 1.0f - p;
  const float positive = alpha * (rest * rest) * -Math::log(p + eps);
  const float negative = (1.0f - alpha) * (p * p) * -Math::log(rest + eps);
  return positive - negative;
}

ASSIGNDETR_HD float least_of(float a, float b) { return a < b ? a : b; }
ASSIGNDETR_HD float most_of(float a, float b) { return a > b ? a : b; }

// A box x, y, w, h that is not finite gives a cost that is not: by its L1 distance.
ASSIGNDETR_HD float box_cost(float x, float y, float w, float h, const CentreBox& b, const CostWeights& weights) {
  const float l1 = std::fabs(x - b.x) + std::fabs(y - b.y) + std::fabs(w - b.w) + std::fabs(h - b.h);
  const float left_a = x - 0.5f * w, right_a = x + 0.5f * w, left_b = b.x - 0.5f * b.w, right_b = b.x + 0.5f * b.w;
  const float top_a = y - 0.5f * h, low_a = y + 0.5f * h, top_b = b.y - 0.5f * b.h, low_b = b.y + 0.5f * b.h;
  const float inter = most_of(least_of(right_a, right_b) - most_of(left_a, left_b), 0.0f) *
                      most_of(least_of(low_a, low_b) - most_of(top_a, top_b), 0.0f);
  const float joined = (right_a - left_a) * (low_a - top_a) + (right_b - left_b) * (low_b - top_b) - inter;
  const float hull = most_of(most_of(right_a, right_b) - least_of(left_a, left_b), 0.0f) *
                     most_of(most_of(low_a, low_b) - least_of(top_a, top_b), 0.0f);
  const float giou = inter / (joined + weights.giou_eps) - (hull - joined) / (hull + weights.giou_eps);
  return weights.l1 * l1 - weights.giou * giou;
}

// The box of the slot comes as four numbers: a struct would keep GCC from making vector code.
template <typename Math>
ASSIGNDETR_HD float pair_cost(float logit, float x, float y, float w, float h, const CentreBox& target,
                              const CostWeights& weights) {
  return weights.classes * class_cost<Math>(logit) + box_cost(x, y, w, h, target, weights);
}

}  // namespace assigndetr
