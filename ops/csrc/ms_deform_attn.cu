// CUDA kernels of multi-scale deformable attention. Called by ops/ms_deform_attn.py, which owns the operator's schema.
// No call waits for the device, and all memory comes from PyTorch's allocator: CUDA graphs can record them.
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "check.h"

#define ASSIGNDETR_LAUNCH(kernel, grid, stream) kernel<<<grid, kThreads, 0, stream>>>
#include "cuda_launch.h"

namespace assigndetr {
namespace {

at::Tensor forward_cuda(const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& locations,
                        const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.is_cuda(), "the cuda kernel needs tensors on a GPU, found ", value.device());
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, locations, weights);
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor output = at::empty({n.batch, n.queries, n.heads * n.channels}, value.options());
  if (output.numel() == 0) {
    return output;  // an empty grid is a launch error
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_cuda", [&] {
    using T = at::opmath_type<scalar_t>;
    launch_forward<scalar_t, T>(value.const_data_ptr<scalar_t>(), levels, n, locations.const_data_ptr<T>(),
                                weights.const_data_ptr<T>(), output.mutable_data_ptr<scalar_t>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

// The largest absolute value, on the device, in the type of the sums. Not finite if one is not.
at::Tensor largest(const at::Tensor& tensor) {
  return at::linalg_vector_norm(tensor, std::numeric_limits<double>::infinity())
      .to(at::toOpMathType(tensor.scalar_type()));
}

// The gradients are in the type of the sums.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cuda(const at::Tensor& grad_output, const at::Tensor& value,
                                                             at::IntArrayRef level_shapes, const at::Tensor& locations,
                                                             const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.is_cuda(), "the cuda kernel needs tensors on a GPU, found ", value.device());
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, locations, weights);
  check_grad(grad_output, value, n);
  const c10::cuda::CUDAGuard guard(value.device());
  const auto options = locations.options();
  if (value.numel() == 0 || weights.numel() == 0) {
    return {at::zeros(value.sizes(), options), at::zeros(locations.sizes(), options),
            at::zeros(weights.sizes(), options)};
  }
  const bool fixed = at::globalContext().deterministicAlgorithms();
  at::Tensor grad_value = fixed ? at::empty(value.sizes(), options) : at::zeros(value.sizes(), options);
  at::Tensor grad_locations = at::empty(locations.sizes(), options);
  at::Tensor grad_weights = at::empty(weights.sizes(), options);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward_cuda", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto launch = [&](const auto& sums) {
      launch_backward<scalar_t, T>(grad_output.const_data_ptr<scalar_t>(), value.const_data_ptr<scalar_t>(), levels, n,
                                   locations.const_data_ptr<T>(), weights.const_data_ptr<T>(), sums,
                                   grad_locations.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<T>(), stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (!fixed) {
      return launch(PlainSums<T>{grad_value.mutable_data_ptr<T>()});
    }
    const at::Tensor largest_grad = largest(grad_output), largest_weight = largest(weights);
    at::Tensor numbers = at::zeros(value.sizes(), options.dtype(at::kLong));
    const FixedSums<T> sums{reinterpret_cast<Fixed*>(numbers.mutable_data_ptr<int64_t>()),
                            largest_grad.const_data_ptr<T>(), largest_weight.const_data_ptr<T>(), log_of_count(n)};
    launch(sums);
    launch_fixed_to_float(sums, value.numel(), grad_value.mutable_data_ptr<T>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace assigndetr

TORCH_LIBRARY_FRAGMENT(assigndetr_ext, m) {
  m.def("forward_cuda(Tensor value, int[] level_shapes, Tensor locations, Tensor weights) -> Tensor",
        &assigndetr::forward_cuda);
  m.def(
      "backward_cuda(Tensor grad_output, Tensor value, int[] level_shapes, Tensor locations, Tensor weights)"
      " -> (Tensor, Tensor, Tensor)",
      &assigndetr::backward_cuda);
}
