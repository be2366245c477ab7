// Checks at the border between Python and the kernels: what a kernel would otherwise read out of bounds.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "bilinear.h"

namespace assigndetr {

inline Levels read_levels(at::IntArrayRef shapes, int64_t cells) {
  TORCH_CHECK_VALUE(!shapes.empty() && shapes.size() % 2 == 0 && shapes.size() / 2 <= kMaxLevels,
                    "level_shapes must be 1 to ", kMaxLevels, " pairs h, w, found ", shapes.size(), " numbers");
  Levels levels{};
  levels.count = static_cast<int>(shapes.size() / 2);
  int64_t start = 0;
  for (int l = 0; l < levels.count; ++l) {
    const int64_t h = shapes[2 * l], w = shapes[2 * l + 1];
    TORCH_CHECK_VALUE(h > 0 && w > 0, "level_shapes must be positive, found ", h, " x ", w, " for level ", l);
    levels.level[l] = {h, w, start};
    start += h * w;
  }
  TORCH_CHECK_VALUE(start == cells, "level_shapes count ", start, " cells, value has ", cells);
  return levels;
}

// Locations and weights are in the type of the sums (float32 for half and bfloat16 values).
inline Sizes read_sizes(const at::Tensor& value, const Levels& levels, const at::Tensor& locations,
                        const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5,
                    "value, locations, weights must have 4, 6, 5 dimensions");
  const Sizes n{value.size(0), value.size(1), weights.size(1), value.size(2), value.size(3), weights.size(4)};
  TORCH_CHECK_VALUE(weights.sizes() == at::IntArrayRef({n.batch, n.queries, n.heads, levels.count, n.points}),
                    "weights do not fit value and level_shapes: ", weights.sizes());
  TORCH_CHECK_VALUE(locations.sizes() == at::IntArrayRef({n.batch, n.queries, n.heads, levels.count, n.points, 2}),
                    "locations do not fit value and level_shapes: ", locations.sizes());
  const auto sums = at::toOpMathType(value.scalar_type());
  TORCH_CHECK_VALUE(locations.scalar_type() == sums && weights.scalar_type() == sums,
                    "locations and weights must be ", sums, " for values of ", value.scalar_type());
  TORCH_CHECK_VALUE(locations.device() == value.device() && weights.device() == value.device(),
                    "value, locations and weights must be on one device");
  TORCH_CHECK_VALUE(value.is_contiguous() && locations.is_contiguous() && weights.is_contiguous(),
                    "value, locations and weights must be contiguous");
  return n;
}

inline void check_grad(const at::Tensor& grad, const at::Tensor& value, const Sizes& n) {
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({n.batch, n.queries, n.heads * n.channels}),
                    "grad_output does not fit value: ", grad.sizes());
  TORCH_CHECK_VALUE(grad.scalar_type() == value.scalar_type() && grad.device() == value.device() &&
                        grad.is_contiguous(),
                    "grad_output must be contiguous and have the type and device of value");
}

}  // namespace assigndetr
