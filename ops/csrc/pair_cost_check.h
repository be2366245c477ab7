// The tensors of pair_cost.py as they come from Python, checked.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "pair_cost.h"

namespace assigndetr {

inline CostSizes read_cost_sizes(const at::Tensor& logits, const at::Tensor& boxes, const at::Tensor& labels,
                                 const at::Tensor& targets, const at::Tensor& image) {
  TORCH_CHECK_VALUE(logits.dim() == 4, "logits must be (L, B, N, C), found ", logits.sizes());
  const int64_t layers = logits.size(0), batch = logits.size(1), slots = logits.size(2), classes = logits.size(3);
  TORCH_CHECK_VALUE(boxes.sizes() == at::IntArrayRef({layers, batch, slots, 4}),
                    "boxes must be (L, B, N, 4) with the L, B, N of logits ", logits.sizes(), ", found ",
                    boxes.sizes());
  const int64_t count = labels.numel();
  TORCH_CHECK_VALUE(labels.dim() == 1 && image.sizes() == at::IntArrayRef({count}) &&
                        labels.scalar_type() == at::kLong && image.scalar_type() == at::kLong &&
                        labels.is_contiguous() && image.is_contiguous(),
                    "labels and image must be contiguous int64 vectors of one length, found ", labels.sizes(), " ",
                    labels.scalar_type(), " and ", image.sizes(), " ", image.scalar_type());
  TORCH_CHECK_VALUE(targets.sizes() == at::IntArrayRef({count, 4}) && targets.scalar_type() == at::kFloat &&
                        targets.is_contiguous(),
                    "targets must be contiguous float32 boxes (", count, ", 4), found ", targets.sizes(), " ",
                    targets.scalar_type());
  for (const at::Tensor& other : {boxes, labels, targets, image}) {
    TORCH_CHECK_VALUE(other.device() == logits.device(), "all tensors must be on ", logits.device(), ", found one on ",
                      other.device());
  }
  return {count,           layers,          batch,           slots,           classes,
          logits.stride(0), logits.stride(1), logits.stride(2), logits.stride(3),
          boxes.stride(0),  boxes.stride(1),  boxes.stride(2),  boxes.stride(3)};
}

}  // namespace assigndetr
