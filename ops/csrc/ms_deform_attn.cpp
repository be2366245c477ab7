// CPU kernels of multi-scale deformable attention. Called by ops/ms_deform_attn.py, which owns the operator's schema.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu_dispatch.h"

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

// Plain loops: for compilers without vectors, and for images whose places do not fit into 32 bits.
template <typename T>
void plain_forward(const T* value, const Levels& levels, const Sizes& n, const T* locations, const T* weights,
                   T* output) {
  const int64_t channels = n.channels, cell_stride = n.heads * channels, samples = levels.count * n.points;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {  // item: (image, query, head)
      const int64_t head = item % n.heads, image = item / (n.heads * n.queries);
      const T* const base = value + image * n.cells * cell_stride + head * channels;
      T* const sum = output + item * channels;
      std::fill_n(sum, channels, T(0));
      for_each_sample(locations + item * samples * 2, levels, n.points, [&](int64_t sample, const Corners<T>& at) {
        for (int k = 0; k < 4; ++k) {
          const T weight = weights[item * samples + sample] * at.weight[k];
          const T* const cell = base + at.cell[k] * cell_stride;
          for (int64_t c = 0; c < channels; ++c) {
            sum[c] += weight * cell[c];
          }
        }
      });
    }
  };
  at::parallel_for(0, n.batch * n.queries * n.heads, /*grain_size=*/64, run);
}

// One task per image and head: no two tasks write the same gradient of a value, so the sums need no atomics and come
// out the same for any number of threads. All gradients are zero before.
template <typename T>
void plain_backward(const T* grad_output, const T* value, const Levels& levels, const Sizes& n, const T* locations,
                    const T* weights, T* grad_value, T* grad_locations, T* grad_weights) {
  const int64_t channels = n.channels, cell_stride = n.heads * channels, samples = levels.count * n.points;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % n.heads, image = task / n.heads;
      const int64_t base = image * n.cells * cell_stride + head * channels;
      for (int64_t query = 0; query < n.queries; ++query) {
        const int64_t item = (image * n.queries + query) * n.heads + head;
        const T* const grad = grad_output + item * channels;
        for_each_sample(locations + item * samples * 2, levels, n.points, [&](int64_t sample, const Corners<T>& at) {
          const int64_t index = item * samples + sample;
          T by_weight = 0, by_x = 0, by_y = 0;
          for (int k = 0; k < 4; ++k) {
            const T* const cell = value + base + at.cell[k] * cell_stride;
            T* const grad_cell = grad_value + base + at.cell[k] * cell_stride;
            const T weight = weights[index] * at.weight[k];
            T dot = 0;
            for (int64_t c = 0; c < channels; ++c) {
              dot += grad[c] * cell[c];
              grad_cell[c] += weight * grad[c];
            }
            by_weight += at.weight[k] * dot;
            by_x += at.slope_x[k] * dot;
            by_y += at.slope_y[k] * dot;
          }
          grad_weights[index] = by_weight;
          grad_locations[2 * index] = weights[index] * by_x;
          grad_locations[2 * index + 1] = weights[index] * by_y;
        });
      }
    }
  };
  at::parallel_for(0, n.batch * n.heads, /*grain_size=*/1, run);
}

// The cells of one image and head, one after the other, in memory of one thread. In the tensors the heads of a cell lie
// side by side, so that the cells of one head fall on few sets of the caches.
template <typename T>
class Plane {
 public:
  explicit Plane(const Sizes& n)
      : n_(n), memory_(c10::GetCPUAllocator()->allocate(std::max<int64_t>(n.cells * n.channels, 1) * sizeof(T))) {}

  T* data() const { return static_cast<T*>(memory_.get()); }
  void clear() const { std::fill_n(data(), n_.cells * n_.channels, T(0)); }

  // Tasks count the heads of all images.
  void read(const T* tensor, int64_t task) const {
    const T* from = begin(tensor, task);
    T* to = data();
    for (int64_t cell = 0; cell < n_.cells; ++cell, from += n_.heads * n_.channels, to += n_.channels) {
      std::copy_n(from, n_.channels, to);
    }
  }

  void write(T* tensor, int64_t task) const {
    T* to = begin(tensor, task);
    const T* from = data();
    for (int64_t cell = 0; cell < n_.cells; ++cell, to += n_.heads * n_.channels, from += n_.channels) {
      std::copy_n(from, n_.channels, to);
    }
  }

 private:
  template <typename Pointer>
  Pointer begin(Pointer tensor, int64_t task) const {
    return tensor + (task / n_.heads * n_.cells * n_.heads + task % n_.heads) * n_.channels;
  }

  const Sizes n_;
  const c10::DataPtr memory_;
};

// Copying the cells of a head pays off where they are read often enough.
bool worth_planes(const Sizes& n) {
  return 2 * n.queries >= n.cells;
}

template <typename T>
Problem<T> make_problem(const Levels& levels, const Sizes& n, const T* locations, const T* weights) {
  Problem<T> problem(levels, n, locations, weights);
  if (n.queries == n.cells) {
    append_tiles(levels, problem.order);
  }
  return problem;
}

template <typename T>
void fast_forward(Forward<T> kernel, const T* value, const Levels& levels, const Sizes& n, const T* locations,
                  const T* weights, T* output) {
  const Problem<T> problem = make_problem(levels, n, locations, weights);
  const int64_t tasks = n.batch * n.heads, threads = at::get_num_threads();
  if (worth_planes(n)) {
    const int64_t parts = tasks > 0 ? (threads + tasks - 1) / tasks : 0;  // of the queries of a head
    at::parallel_for(0, tasks * parts, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
      const Plane<T> plane(n);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t task = i / parts, part = i % parts, image = task / n.heads, head = task % n.heads;
        if (i == begin || part == 0) {
          plane.read(value, task);
        }
        kernel(problem, {image, head, head + 1, n.queries * part / parts, n.queries * (part + 1) / parts},
               {n.channels, 0}, plane.data(), output);
      }
    });
    return;
  }
  at::parallel_for(0, n.batch * n.queries, /*grain_size=*/8, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / n.queries, first = begin % n.queries;
      const int64_t last = std::min(n.queries, first + end - begin);
      kernel(problem, {image, 0, n.heads, first, last}, {n.heads * n.channels, n.channels},
             value + image * n.cells * n.heads * n.channels, output);
      begin += last - first;
    }
  });
}

// One task per image and head, as in plain_backward. Memory of grad_value is touched first here, by the thread that
// goes on to use it: zeros from elsewhere would be one more way through memory.
template <typename T>
void fast_backward(Backward<T> kernel, const T* grad_output, const T* value, const Levels& levels, const Sizes& n,
                   const T* locations, const T* weights, T* grad_value, T* grad_locations, T* grad_weights) {
  const Problem<T> problem = make_problem(levels, n, locations, weights);
  const bool planes = worth_planes(n);
  at::parallel_for(0, n.batch * n.heads, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    if (planes) {
      const Plane<T> plane(n), grad_plane(n);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / n.heads, head = task % n.heads;
        plane.read(value, task);
        grad_plane.clear();
        kernel(problem, {image, head, head + 1, 0, n.queries}, {n.channels, 0}, plane.data(), grad_output,
               grad_plane.data(), grad_locations, grad_weights);
        grad_plane.write(grad_value, task);
      }
      return;
    }
    while (begin < end) {
      const int64_t image = begin / n.heads, first = begin % n.heads, last = std::min(n.heads, first + end - begin);
      const int64_t stride = n.heads * n.channels, offset = image * n.cells * stride;
      for (int64_t cell = 0; cell < n.cells; ++cell) {
        std::fill_n(grad_value + offset + cell * stride + first * n.channels, (last - first) * n.channels, T(0));
      }
      kernel(problem, {image, first, last, 0, n.queries}, {stride, n.channels}, value + offset, grad_output,
             grad_value + offset, grad_locations, grad_weights);
      begin += last - first;
    }
  });
}

std::vector<std::string> cpu_isas_op() { return cpu_isas(); }

at::Tensor forward_cpu(const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& locations,
                       const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.is_cpu(), "the cpu kernel needs tensors on the CPU, found ", value.device());
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, locations, weights);
  // Half precision is converted as a whole: PyTorch does that with vectors and threads.
  const at::Tensor wide = value.to(locations.scalar_type());
  at::Tensor output = at::empty({n.batch, n.queries, n.heads * n.channels}, wide.options());
  AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "ms_deform_attn_cpu", [&] {
    using T = scalar_t;
    const Forward<T> kernel = choose_kernels<T>(chosen_isa(), n.channels).forward;
    if (kernel != nullptr && places_fit<T>(n)) {
      fast_forward<T>(kernel, wide.const_data_ptr<T>(), levels, n, locations.const_data_ptr<T>(),
                      weights.const_data_ptr<T>(), output.mutable_data_ptr<T>());
    } else {
      plain_forward<T>(wide.const_data_ptr<T>(), levels, n, locations.const_data_ptr<T>(),
                       weights.const_data_ptr<T>(), output.mutable_data_ptr<T>());
    }
  });
  return output.to(value.scalar_type());
}

// The gradients are in the type of the sums.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cpu(const at::Tensor& grad_output, const at::Tensor& value,
                                                            at::IntArrayRef level_shapes, const at::Tensor& locations,
                                                            const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.is_cpu(), "the cpu kernel needs tensors on the CPU, found ", value.device());
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, locations, weights);
  check_grad(grad_output, value, n);
  const at::Tensor wide = value.to(locations.scalar_type()), wide_grad = grad_output.to(locations.scalar_type());
  at::Tensor grad_value, grad_locations, grad_weights;
  AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "ms_deform_attn_backward_cpu", [&] {
    using T = scalar_t;
    const Backward<T> kernel = choose_kernels<T>(chosen_isa(), n.channels).backward;
    const bool fast = kernel != nullptr && places_fit<T>(n);
    const auto allocate = [&](const at::Tensor& like) {  // the fast kernels write every number themselves
      return fast ? at::empty(like.sizes(), wide.options()) : at::zeros(like.sizes(), wide.options());
    };
    grad_value = allocate(value);
    grad_locations = allocate(locations);
    grad_weights = allocate(weights);
    const T *const grad = wide_grad.const_data_ptr<T>(), *const cells = wide.const_data_ptr<T>();
    const T *const where = locations.const_data_ptr<T>(), *const attention = weights.const_data_ptr<T>();
    T *const by_value = grad_value.mutable_data_ptr<T>(), *const by_location = grad_locations.mutable_data_ptr<T>();
    T* const by_weight = grad_weights.mutable_data_ptr<T>();
    if (fast) {
      fast_backward<T>(kernel, grad, cells, levels, n, where, attention, by_value, by_location, by_weight);
    } else {
      plain_backward<T>(grad, cells, levels, n, where, attention, by_value, by_location, by_weight);
    }
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace assigndetr

TORCH_LIBRARY_FRAGMENT(assigndetr_ext, m) {
  m.def("cpu_isas() -> str[]", &assigndetr::cpu_isas_op);
  m.def("forward_cpu(Tensor value, int[] level_shapes, Tensor locations, Tensor weights) -> Tensor",
        &assigndetr::forward_cpu);
  m.def(
      "backward_cpu(Tensor grad_output, Tensor value, int[] level_shapes, Tensor locations, Tensor weights)"
      " -> (Tensor, Tensor, Tensor)",
      &assigndetr::backward_cpu);
}
