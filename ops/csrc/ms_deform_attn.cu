// CUDA kernels of multi-scale deformable attention. Called by ops/ms_deform_attn.py, which owns the operator's schema.
// No call waits for the device, and all memory comes from PyTorch's allocator: CUDA graphs can record them.
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <type_traits>

#include "check.h"

#define ASSIGNDETR_LAUNCH(kernel, grid, stream) kernel<<<grid, kThreads, 0, stream>>>
#include "cuda_launch.h"

namespace assigndetr {
namespace {

// `read` makes a Source of the types that it is given pointers of.
template <typename Read>
at::Tensor forward(const at::Tensor& value, at::IntArrayRef level_shapes, const SourceTensors& from,
                   const Read& read) {
  TORCH_CHECK_VALUE(value.is_cuda(), "the cuda kernel needs tensors on a GPU, found ", value.device());
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, from);
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor output = at::empty({n.batch, n.queries, n.heads * n.channels}, value.options());
  if (output.numel() == 0) {
    return output;  // an empty grid is a launch error
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_cuda", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto source = read(static_cast<scalar_t*>(nullptr), static_cast<T*>(nullptr));
    launch_forward<scalar_t, T>(value.const_data_ptr<scalar_t>(), levels, n, source,
                                output.mutable_data_ptr<scalar_t>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

// The largest absolute value, on the device, in the type of the sums. Not finite if one is not.
at::Tensor largest(const at::Tensor& tensor) {
  return at::linalg_vector_norm(tensor, std::numeric_limits<double>::infinity())
      .to(at::toOpMathType(tensor.scalar_type()));
}

// Return the gradient of the value, in the type of the sums, and have the others written to `grad_source`, which is
// made by `write` as the source is by `read`. `largest_weight` is called for sums in fixed point only.
template <typename Read, typename Write, typename LargestWeight>
at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& value, const Levels& levels, const Sizes& n,
                    const Read& read, const Write& write, const LargestWeight& largest_weight) {
  const auto options = value.options().dtype(at::toOpMathType(value.scalar_type()));
  const bool fixed = at::globalContext().deterministicAlgorithms();
  at::Tensor grad_value = fixed ? at::empty(value.sizes(), options) : at::zeros(value.sizes(), options);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward_cuda", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto source = read(static_cast<scalar_t*>(nullptr), static_cast<T*>(nullptr));
    const auto grad_source = write(source);
    const auto launch = [&](const auto& sums) {
      launch_backward<scalar_t, T>(grad_output.const_data_ptr<scalar_t>(), value.const_data_ptr<scalar_t>(), levels, n,
                                   source, sums, grad_source, stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (!fixed) {
      return launch(PlainSums<T>{grad_value.mutable_data_ptr<T>()});
    }
    const at::Tensor grad = largest(grad_output), weight = largest_weight();
    at::Tensor numbers = at::zeros(value.sizes(), options.dtype(at::kLong));
    const FixedSums<T> sums{reinterpret_cast<Fixed*>(numbers.mutable_data_ptr<int64_t>()), grad.const_data_ptr<T>(),
                            weight.const_data_ptr<T>(), log_of_count(n)};
    launch(sums);
    launch_fixed_to_float(sums, value.numel(), grad_value.mutable_data_ptr<T>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad_value;
}

auto read_stored(const at::Tensor& locations, const at::Tensor& weights) {
  return [&](auto*, auto* sum) {
    using T = std::remove_pointer_t<decltype(sum)>;
    return StoredSource<T>{locations.const_data_ptr<T>(), weights.const_data_ptr<T>()};
  };
}

auto read_fused(const at::Tensor& reference, const at::Tensor& offsets, const at::Tensor& logits) {
  return [&](auto* number, auto* sum) {
    using scalar_t = std::remove_pointer_t<decltype(number)>;
    using T = std::remove_pointer_t<decltype(sum)>;
    return FusedSource<scalar_t, T>{offsets.const_data_ptr<scalar_t>(), logits.const_data_ptr<scalar_t>(),
                                    reference.const_data_ptr<T>(), static_cast<int>(reference.size(3)),
                                    box_share<T>(logits.size(4))};
  };
}

at::Tensor forward_cuda(const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& locations,
                        const at::Tensor& weights) {
  return forward(value, level_shapes, {locations, weights, {}}, read_stored(locations, weights));
}

// The gradients are in the type of the sums.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cuda(const at::Tensor& grad_output, const at::Tensor& value,
                                                             at::IntArrayRef level_shapes, const at::Tensor& locations,
                                                             const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.is_cuda(), "the cuda kernel needs tensors on a GPU, found ", value.device());
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, {locations, weights, {}});
  check_grad(grad_output, value, n);
  const c10::cuda::CUDAGuard guard(value.device());
  const auto options = locations.options();
  if (value.numel() == 0 || weights.numel() == 0) {
    return {at::zeros(value.sizes(), options), at::zeros(locations.sizes(), options),
            at::zeros(weights.sizes(), options)};
  }
  at::Tensor grad_locations = at::empty(locations.sizes(), options);
  at::Tensor grad_weights = at::empty(weights.sizes(), options);
  const auto write = [&](const auto& source) {
    using Source = std::decay_t<decltype(source)>;
    using T = typename Source::Sum;
    return typename Source::Gradient{grad_locations.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<T>()};
  };
  const at::Tensor grad_value = backward(grad_output, value, levels, n, read_stored(locations, weights), write,
                                         [&] { return largest(weights); });
  return {grad_value, grad_locations, grad_weights};
}

at::Tensor forward_fused_cuda(const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& reference,
                              const at::Tensor& offsets, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(offsets.scalar_type() == value.scalar_type(), "offsets and logits must have the type of value");
  return forward(value, level_shapes, {offsets, logits, reference}, read_fused(reference, offsets, logits));
}

// The gradients of value, reference points and logits are in the type of the sums, those of offsets in that of offsets.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_fused_cuda(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& reference,
    const at::Tensor& offsets, const at::Tensor& logits, bool wants_reference) {
  TORCH_CHECK_VALUE(value.is_cuda(), "the cuda kernel needs tensors on a GPU, found ", value.device());
  TORCH_CHECK_VALUE(offsets.scalar_type() == value.scalar_type(), "offsets and logits must have the type of value");
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, {offsets, logits, reference});
  check_grad(grad_output, value, n);
  const c10::cuda::CUDAGuard guard(value.device());
  const auto options = reference.options();
  if (value.numel() == 0 || logits.numel() == 0) {
    return {at::zeros(value.sizes(), options),
            wants_reference ? at::zeros(reference.sizes(), options) : at::empty({0}, options),
            at::zeros_like(offsets), at::zeros(logits.sizes(), options)};
  }
  at::Tensor grad_offsets = at::empty_like(offsets), grad_logits = at::empty(logits.sizes(), options);
  at::Tensor by_head = at::empty({0}, options);
  if (wants_reference) {
    by_head = at::empty({n.batch, n.queries, n.heads, levels.count, reference.size(3)}, options);
  }
  const auto write = [&](const auto& source) {
    using Source = std::decay_t<decltype(source)>;
    using T = typename Source::Sum;
    return typename Source::Gradient{grad_offsets.mutable_data_ptr<typename Source::Number>(),
                                     grad_logits.mutable_data_ptr<T>(),
                                     wants_reference ? by_head.mutable_data_ptr<T>() : nullptr};
  };
  // A softmax is at most 1, and no number where a logit is none.
  const auto largest_weight = [&] { return at::amax(logits).to(reference.scalar_type()).mul(0).add(1); };
  const at::Tensor grad_value =
      backward(grad_output, value, levels, n, read_fused(reference, offsets, logits), write, largest_weight);
  return {grad_value, wants_reference ? by_head.sum(2) : by_head, grad_offsets, grad_logits};
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
  m.def(
      "forward_fused_cuda(Tensor value, int[] level_shapes, Tensor reference, Tensor offsets, Tensor logits) -> Tensor",
      &assigndetr::forward_fused_cuda);
  m.def(
      "backward_fused_cuda(Tensor grad_output, Tensor value, int[] level_shapes, Tensor reference, Tensor offsets,"
      " Tensor logits, bool wants_reference) -> (Tensor, Tensor, Tensor, Tensor)",
      &assigndetr::backward_fused_cuda);
}
