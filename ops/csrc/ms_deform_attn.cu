// CUDA kernels of multi-scale deformable attention. Called by ops/ms_deform_attn.py, which owns the operator's schema.
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "check.h"

namespace assigndetr {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = int64_t(1) << 20;  // the kernels stride over what is left

int blocks_for(int64_t threads) {
  return static_cast<int>(std::min<int64_t>((threads + kThreads - 1) / kThreads, kMaxBlocks));
}

// One thread per output element; neighbouring threads read neighbouring channels.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const scalar_t* __restrict__ value, const Levels levels, const Sizes n,
                   const T* __restrict__ locations, const T* __restrict__ weights, scalar_t* __restrict__ output) {
  const int64_t cell_stride = n.heads * n.channels, samples = levels.count * n.points;
  const int64_t total = n.batch * n.queries * cell_stride, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < total; index += step) {
    const int64_t item = index / n.channels;  // (image, query, head)
    const int64_t channel = index % n.channels, head = item % n.heads, image = item / (n.heads * n.queries);
    const scalar_t* const base = value + image * n.cells * cell_stride + head * n.channels + channel;
    int64_t sample = item * samples;
    T sum = 0;
    for (int l = 0; l < levels.count; ++l) {
      for (int64_t p = 0; p < n.points; ++p, ++sample) {
        Corners<T> at;
        if (locate(locations[2 * sample], locations[2 * sample + 1], levels.level[l], at)) {
          T read = 0;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            read += at.weight[k] * static_cast<T>(base[at.cell[k] * cell_stride]);
          }
          sum += weights[sample] * read;
        }
      }
    }
    output[index] = static_cast<scalar_t>(sum);
  }
}

// `lanes` threads of a warp share one (image, query, head) and go over its channels together. The gradients of locations
// and weights are sums over channels, taken by shuffles; the gradient of the values is added with atomics, in an
// order that changes from run to run.
template <typename scalar_t, typename T, int lanes>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ value, const Levels levels,
                    const Sizes n, const T* __restrict__ locations, const T* __restrict__ weights,
                    T* __restrict__ grad_value, T* __restrict__ grad_locations, T* __restrict__ grad_weights) {
  const int64_t cell_stride = n.heads * n.channels, samples = levels.count * n.points;
  const int64_t total = n.batch * n.queries * n.heads;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.x / lanes;
  const int lane = threadIdx.x % lanes;
  // The loop bound is the same for a whole warp, so that all its threads meet in the shuffles.
  const int64_t warp_first = thread / kWarp * (kWarp / lanes);
  for (int64_t first = warp_first; first < total; first += step) {
    const int64_t item = first + (threadIdx.x % kWarp) / lanes;
    const bool active = item < total;
    const int64_t head = item % n.heads, image = item / (n.heads * n.queries);
    const int64_t base = image * n.cells * cell_stride + head * n.channels;
    const scalar_t* const grad = grad_output + item * n.channels;
    int64_t sample = item * samples;
    for (int l = 0; l < levels.count; ++l) {
      for (int64_t p = 0; p < n.points; ++p, ++sample) {
        Corners<T> at;
        T by_weight = 0, by_x = 0, by_y = 0;
        const T a = active ? weights[sample] : T(0);
        if (active && locate(locations[2 * sample], locations[2 * sample + 1], levels.level[l], at)) {
          for (int64_t c = lane; c < n.channels; c += lanes) {
            const T g = static_cast<T>(grad[c]);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              if (at.weight[k] == T(0) && at.slope_x[k] == T(0) && at.slope_y[k] == T(0)) {
                continue;  // outside the map: spare the atomic
              }
              const int64_t cell = base + at.cell[k] * cell_stride + c;
              const T product = g * static_cast<T>(value[cell]);
              by_weight += at.weight[k] * product;
              by_x += at.slope_x[k] * product;
              by_y += at.slope_y[k] * product;
              atomicAdd(grad_value + cell, a * at.weight[k] * g);
            }
          }
        }
#pragma unroll
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
          by_weight += __shfl_down_sync(0xffffffffu, by_weight, distance, lanes);
          by_x += __shfl_down_sync(0xffffffffu, by_x, distance, lanes);
          by_y += __shfl_down_sync(0xffffffffu, by_y, distance, lanes);
        }
        if (active && lane == 0) {
          grad_weights[sample] = by_weight;
          grad_locations[2 * sample] = a * by_x;
          grad_locations[2 * sample + 1] = a * by_y;
        }
      }
    }
  }
}

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
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_cuda", [&] {
    using T = at::opmath_type<scalar_t>;
    forward_kernel<scalar_t, T><<<blocks_for(output.numel()), kThreads, 0, stream>>>(
        value.const_data_ptr<scalar_t>(), levels, n, locations.const_data_ptr<T>(), weights.const_data_ptr<T>(),
        output.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

template <typename scalar_t, int lanes>
void launch_backward(const at::Tensor& grad_output, const at::Tensor& value, const Levels& levels, const Sizes& n,
                     const at::Tensor& locations, const at::Tensor& weights, const at::Tensor& grad_value,
                     const at::Tensor& grad_locations, const at::Tensor& grad_weights) {
  using T = at::opmath_type<scalar_t>;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  backward_kernel<scalar_t, T, lanes><<<blocks_for(n.batch * n.queries * n.heads * lanes), kThreads, 0, stream>>>(
      grad_output.const_data_ptr<scalar_t>(), value.const_data_ptr<scalar_t>(), levels, n,
      locations.const_data_ptr<T>(), weights.const_data_ptr<T>(), grad_value.mutable_data_ptr<T>(),
      grad_locations.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The gradients are in the type of the sums.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cuda(const at::Tensor& grad_output, const at::Tensor& value,
                                                             at::IntArrayRef level_shapes, const at::Tensor& locations,
                                                             const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.is_cuda(), "the cuda kernel needs tensors on a GPU, found ", value.device());
  at::globalContext().alertNotDeterministic("assigndetr::ms_deform_attn_backward on CUDA");
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, locations, weights);
  check_grad(grad_output, value, n);
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor grad_value = at::zeros(value.sizes(), locations.options());
  at::Tensor grad_locations = at::zeros(locations.sizes(), locations.options());
  at::Tensor grad_weights = at::zeros(weights.sizes(), weights.options());
  if (value.numel() > 0 && weights.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward_cuda", [&] {
      const auto launch = n.channels > 16  ? launch_backward<scalar_t, 32>
                          : n.channels > 8 ? launch_backward<scalar_t, 16>
                                           : launch_backward<scalar_t, 8>;
      launch(grad_output, value, levels, n, locations, weights, grad_value, grad_locations, grad_weights);
    });
  }
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
