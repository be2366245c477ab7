// The matching costs of a step on the GPU. Called by ops/pair_cost.py; waits for nothing.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/macros/Macros.h>
#include <torch/library.h>

#include "pair_cost_check.h"

#define ASSIGNDETR_ASSERT(condition) CUDA_KERNEL_ASSERT(condition)
#define ASSIGNDETR_LAUNCH(kernel, grid, stream) kernel<<<grid, kThreads, 0, stream>>>
#include "cuda_costs.h"

namespace assigndetr {
namespace {

// Return (targets, layers, slots) float32.
at::Tensor pair_costs_cuda(const at::Tensor& logits, const at::Tensor& boxes, const at::Tensor& labels,
                           const at::Tensor& targets, const at::Tensor& image, double class_weight, double l1_weight,
                           double giou_weight, double giou_eps) {
  TORCH_CHECK_VALUE(logits.is_cuda(), "logits must be on a GPU, found ", logits.device());
  const CostSizes n = read_cost_sizes(logits, boxes, labels, targets, image);
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor costs = at::empty({n.targets, n.layers, n.slots}, logits.options().dtype(at::kFloat));
  if (costs.numel() == 0) {
    return costs;  // an empty grid is a launch error
  }
  const CostWeights weights{static_cast<float>(class_weight), static_cast<float>(l1_weight),
                            static_cast<float>(giou_weight), static_cast<float>(giou_eps)};
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "pair_costs_logits", [&] {
    using logit_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, boxes.scalar_type(), "pair_costs_boxes", [&] {
      launch_pair_costs(logits.const_data_ptr<logit_t>(), boxes.const_data_ptr<scalar_t>(),
                        labels.const_data_ptr<int64_t>(), image.const_data_ptr<int64_t>(),
                        targets.const_data_ptr<float>(), n, weights, costs.mutable_data_ptr<float>(), stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return costs;
}

}  // namespace
}  // namespace assigndetr

TORCH_LIBRARY_FRAGMENT(assigndetr_ext, m) {
  m.def(
      "pair_costs_cuda(Tensor logits, Tensor boxes, Tensor labels, Tensor targets, Tensor image, float class_weight,"
      " float l1_weight, float giou_weight, float giou_eps) -> Tensor",
      &assigndetr::pair_costs_cuda);
}
