// CPU kernels of multi-scale deformable attention. Called by ops/ms_deform_attn.py, which owns the operator's schema.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "check.h"

namespace assigndetr {
namespace {

// Call visit(sample, level, corners) for every sample of one query and head that sees a cell.
template <typename T, typename Visit>
void for_each_sample(const T* locations, const Levels& levels, int64_t points, const Visit& visit) {
  Corners<T> corners;
  for (int l = 0; l < levels.count; ++l) {
    for (int64_t p = 0; p < points; ++p) {
      const int64_t sample = l * points + p;
      if (locate(locations[2 * sample], locations[2 * sample + 1], levels.level[l], corners)) {
        visit(sample, corners);
      }
    }
  }
}

template <typename scalar_t, typename T>
void forward_kernel(const scalar_t* value, const Levels& levels, const Sizes& n, const T* locations, const T* weights,
                    scalar_t* output) {
  const int64_t channels = n.channels, cell_stride = n.heads * channels, samples = levels.count * n.points;
  const auto run = [&](int64_t begin, int64_t end) {
    std::vector<T> sums(channels);
    T* const sum = sums.data();
    for (int64_t item = begin; item < end; ++item) {  // item: (image, query, head)
      const int64_t head = item % n.heads, image = item / (n.heads * n.queries);
      const scalar_t* const base = value + image * n.cells * cell_stride + head * channels;
      std::fill(sums.begin(), sums.end(), T(0));
      for_each_sample(locations + item * samples * 2, levels, n.points, [&](int64_t sample, const Corners<T>& at) {
        const T a = weights[item * samples + sample];
        const T w0 = a * at.weight[0], w1 = a * at.weight[1], w2 = a * at.weight[2], w3 = a * at.weight[3];
        const scalar_t* const v0 = base + at.cell[0] * cell_stride;
        const scalar_t* const v1 = base + at.cell[1] * cell_stride;
        const scalar_t* const v2 = base + at.cell[2] * cell_stride;
        const scalar_t* const v3 = base + at.cell[3] * cell_stride;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] += w0 * static_cast<T>(v0[c]) + w1 * static_cast<T>(v1[c]) + w2 * static_cast<T>(v2[c]) +
                    w3 * static_cast<T>(v3[c]);
        }
      });
      for (int64_t c = 0; c < channels; ++c) {
        output[item * channels + c] = static_cast<scalar_t>(sum[c]);
      }
    }
  };
  at::parallel_for(0, n.batch * n.queries * n.heads, /*grain_size=*/64, run);
}

// One task per image and head: no two tasks write the same gradient of a value, so the sums need no atomics and come
// out the same for any number of threads.
template <typename scalar_t, typename T>
void backward_kernel(const scalar_t* grad_output, const scalar_t* value, const Levels& levels, const Sizes& n,
                     const T* locations, const T* weights, T* grad_value, T* grad_locations, T* grad_weights) {
  const int64_t channels = n.channels, cell_stride = n.heads * channels, samples = levels.count * n.points;
  const auto run = [&](int64_t begin, int64_t end) {
    std::vector<T> grads(channels);
    T* const grad = grads.data();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % n.heads, image = task / n.heads;
      const int64_t base = image * n.cells * cell_stride + head * channels;
      for (int64_t query = 0; query < n.queries; ++query) {
        const int64_t item = (image * n.queries + query) * n.heads + head;
        for (int64_t c = 0; c < channels; ++c) {
          grad[c] = static_cast<T>(grad_output[item * channels + c]);
        }
        for_each_sample(locations + item * samples * 2, levels, n.points, [&](int64_t sample, const Corners<T>& at) {
          const T a = weights[item * samples + sample];
          T by_weight = 0, by_x = 0, by_y = 0;
          for (int k = 0; k < 4; ++k) {
            const scalar_t* const v = value + base + at.cell[k] * cell_stride;
            T* const grad_v = grad_value + base + at.cell[k] * cell_stride;
            const T w = a * at.weight[k];
            T dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t c = 0; c < channels; ++c) {
              dot += grad[c] * static_cast<T>(v[c]);
              grad_v[c] += w * grad[c];
            }
            by_weight += at.weight[k] * dot;
            by_x += at.slope_x[k] * dot;
            by_y += at.slope_y[k] * dot;
          }
          const int64_t index = item * samples + sample;
          grad_weights[index] = by_weight;
          grad_locations[2 * index] = a * by_x;
          grad_locations[2 * index + 1] = a * by_y;
        });
      }
    }
  };
  at::parallel_for(0, n.batch * n.heads, /*grain_size=*/1, run);
}

at::Tensor forward_cpu(const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& locations,
                       const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.is_cpu(), "the cpu kernel needs tensors on the CPU, found ", value.device());
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, locations, weights);
  at::Tensor output = at::empty({n.batch, n.queries, n.heads * n.channels}, value.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_cpu", [&] {
    using T = at::opmath_type<scalar_t>;
    forward_kernel<scalar_t, T>(value.const_data_ptr<scalar_t>(), levels, n, locations.const_data_ptr<T>(),
                                weights.const_data_ptr<T>(), output.mutable_data_ptr<scalar_t>());
  });
  return output;
}

// The gradients are in the type of the sums.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cpu(const at::Tensor& grad_output, const at::Tensor& value,
                                                            at::IntArrayRef level_shapes, const at::Tensor& locations,
                                                            const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.is_cpu(), "the cpu kernel needs tensors on the CPU, found ", value.device());
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, locations, weights);
  check_grad(grad_output, value, n);
  at::Tensor grad_value = at::zeros(value.sizes(), locations.options());
  at::Tensor grad_locations = at::zeros(locations.sizes(), locations.options());
  at::Tensor grad_weights = at::zeros(weights.sizes(), weights.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward_cpu", [&] {
    using T = at::opmath_type<scalar_t>;
    backward_kernel<scalar_t, T>(grad_output.const_data_ptr<scalar_t>(), value.const_data_ptr<scalar_t>(), levels, n,
                                 locations.const_data_ptr<T>(), weights.const_data_ptr<T>(),
                                 grad_value.mutable_data_ptr<T>(), grad_locations.mutable_data_ptr<T>(),
                                 grad_weights.mutable_data_ptr<T>());
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace assigndetr

TORCH_LIBRARY_FRAGMENT(assigndetr_ext, m) {
  m.def("forward_cpu(Tensor value, int[] level_shapes, Tensor locations, Tensor weights) -> Tensor",
        &assigndetr::forward_cpu);
  m.def(
      "backward_cpu(Tensor grad_output, Tensor value, int[] level_shapes, Tensor locations, Tensor weights)"
      " -> (Tensor, Tensor, Tensor)",
      &assigndetr::backward_cpu);
}
