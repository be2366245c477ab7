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

// The tensors of a Source (projected.h); `reference` is undefined if locations and weights are given.
struct SourceTensors {
  at::Tensor where, attend, reference;

  int numbers() const { return reference.defined() ? static_cast<int>(reference.size(3)) : 0; }
};

inline Sizes read_sizes(const at::Tensor& value, const Levels& levels, const SourceTensors& from) {
  const bool given = !from.reference.defined();
  const char *const where = given ? "locations" : "offsets", *const attend = given ? "weights" : "logits";
  TORCH_CHECK_VALUE(value.dim() == 4 && from.where.dim() == 6 && from.attend.dim() == 5, "value, ", where, ", ",
                    attend, " must have 4, 6, 5 dimensions");
  const Sizes n{value.size(0), value.size(1), from.attend.size(1), value.size(2), value.size(3), from.attend.size(4)};
  TORCH_CHECK_VALUE(from.attend.sizes() == at::IntArrayRef({n.batch, n.queries, n.heads, levels.count, n.points}),
                    attend, " do not fit value and level_shapes: ", from.attend.sizes());
  TORCH_CHECK_VALUE(
      from.where.sizes() == at::IntArrayRef({n.batch, n.queries, n.heads, levels.count, n.points, 2}), where,
      " do not fit value and level_shapes: ", from.where.sizes());
  TORCH_CHECK_VALUE(from.where.scalar_type() == from.attend.scalar_type(), where, " and ", attend,
                    " must have one type");
  TORCH_CHECK_VALUE(from.where.device() == value.device() && from.attend.device() == value.device(), "value, ", where,
                    " and ", attend, " must be on one device");
  TORCH_CHECK_VALUE(value.is_contiguous() && from.where.is_contiguous() && from.attend.is_contiguous(), "value, ",
                    where, " and ", attend, " must be contiguous");
  const auto sums = at::toOpMathType(value.scalar_type());
  if (given) {
    TORCH_CHECK_VALUE(from.where.scalar_type() == sums, "locations and weights must be ", sums, " for values of ",
                      value.scalar_type());
    return n;
  }
  const at::Tensor& reference = from.reference;
  TORCH_CHECK_VALUE(reference.dim() == 4 && (reference.size(3) == 2 || reference.size(3) == 4) &&
                        reference.sizes().slice(0, 3) == at::IntArrayRef({n.batch, n.queries, levels.count}),
                    "reference points do not fit value and level_shapes: ", reference.sizes());
  TORCH_CHECK_VALUE(reference.scalar_type() == sums && reference.device() == value.device() &&
                        reference.is_contiguous(),
                    "reference points must be contiguous, ", sums, " and on the device of value");
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
