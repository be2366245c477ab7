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
#include "cpu_plain.h"

namespace assigndetr {
namespace {

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
Problem<T> make_problem(const Levels& levels, const Sizes& n, const Source<T>& source) {
  Problem<T> problem(levels, n, source);
  if (n.queries == n.cells) {
    append_tiles(levels, problem.order);
  }
  return problem;
}

template <typename T>
void fast_forward(Forward<T> kernel, const T* value, const Levels& levels, const Sizes& n, const Source<T>& source,
                  T* output) {
  const Problem<T> problem = make_problem(levels, n, source);
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
                   const Source<T>& source, T* grad_value, const SourceGradient<T>& grad_source) {
  const Problem<T> problem = make_problem(levels, n, source);
  const bool planes = worth_planes(n);
  at::parallel_for(0, n.batch * n.heads, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    if (planes) {
      const Plane<T> plane(n), grad_plane(n);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / n.heads, head = task % n.heads;
        plane.read(value, task);
        grad_plane.clear();
        kernel(problem, {image, head, head + 1, 0, n.queries}, {n.channels, 0}, plane.data(), grad_output,
               grad_plane.data(), grad_source);
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
             grad_value + offset, grad_source);
      begin += last - first;
    }
  });
}

std::vector<std::string> cpu_isas_op() { return cpu_isas(); }

template <typename T>
Source<T> read_source(const SourceTensors& from) {
  return {from.where.const_data_ptr<T>(), from.attend.const_data_ptr<T>(),
          from.reference.defined() ? from.reference.const_data_ptr<T>() : nullptr, from.numbers()};
}

// `from` is in the type of the sums.
at::Tensor forward(const at::Tensor& value, at::IntArrayRef level_shapes, const SourceTensors& from) {
  TORCH_CHECK_VALUE(value.is_cpu(), "the cpu kernel needs tensors on the CPU, found ", value.device());
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, from);
  // Half precision is converted as a whole: PyTorch does that with vectors and threads.
  const at::Tensor wide = value.to(from.where.scalar_type());
  at::Tensor output = at::empty({n.batch, n.queries, n.heads * n.channels}, wide.options());
  AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "ms_deform_attn_cpu", [&] {
    using T = scalar_t;
    const Forward<T> kernel = choose_kernels<T>(chosen_isa(), n.channels).forward;
    const Source<T> source = read_source<T>(from);
    if (kernel != nullptr && places_fit<T>(n)) {
      fast_forward<T>(kernel, wide.const_data_ptr<T>(), levels, n, source, output.mutable_data_ptr<T>());
    } else {
      plain_forward<T>(wide.const_data_ptr<T>(), levels, n, source, output.mutable_data_ptr<T>());
    }
  });
  return output.to(value.scalar_type());
}

// Sum what the heads give to the reference points, (image, query, head, ...) to (image, query, ...), in their order.
template <typename T>
void add_heads(const T* from, int64_t queries, int64_t heads, int64_t numbers, T* to) {
  at::parallel_for(0, queries, /*grain_size=*/256, [&](int64_t begin, int64_t end) {
    for (int64_t query = begin; query < end; ++query) {
      for (int64_t i = 0; i < numbers; ++i) {
        T sum = 0;
        for (int64_t head = 0; head < heads; ++head) {
          sum += from[(query * heads + head) * numbers + i];
        }
        to[query * numbers + i] = sum;
      }
    }
  });
}

struct Gradients {
  at::Tensor value, where, attend, reference;  // the last is undefined if nobody wants it
};

// The gradients are in the type of the sums.
Gradients backward(const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef level_shapes,
                   const SourceTensors& from, bool wants_reference) {
  TORCH_CHECK_VALUE(value.is_cpu(), "the cpu kernel needs tensors on the CPU, found ", value.device());
  const Levels levels = read_levels(level_shapes, value.size(1));
  const Sizes n = read_sizes(value, levels, from);
  check_grad(grad_output, value, n);
  const auto sums = from.where.scalar_type();
  const at::Tensor wide = value.to(sums), wide_grad = grad_output.to(sums);
  Gradients to;
  AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "ms_deform_attn_backward_cpu", [&] {
    using T = scalar_t;
    const Backward<T> kernel = choose_kernels<T>(chosen_isa(), n.channels).backward;
    const bool fast = kernel != nullptr && places_fit<T>(n);
    const auto allocate = [&](at::IntArrayRef sizes) {  // the fast kernels write every number themselves
      return fast ? at::empty(sizes, wide.options()) : at::zeros(sizes, wide.options());
    };
    to.value = allocate(value.sizes());
    to.where = allocate(from.where.sizes());
    to.attend = allocate(from.attend.sizes());
    SourceGradient<T> grad_source{to.where.mutable_data_ptr<T>(), to.attend.mutable_data_ptr<T>(), nullptr};
    at::Tensor by_head;
    if (wants_reference) {
      by_head = allocate({n.batch, n.queries, n.heads, levels.count, from.numbers()});
      grad_source.reference = by_head.mutable_data_ptr<T>();
    }
    const Source<T> source = read_source<T>(from);
    const T *const grad = wide_grad.const_data_ptr<T>(), *const cells = wide.const_data_ptr<T>();
    T* const by_value = to.value.mutable_data_ptr<T>();
    if (fast) {
      fast_backward<T>(kernel, grad, cells, levels, n, source, by_value, grad_source);
    } else {
      plain_backward<T>(grad, cells, levels, n, source, by_value, grad_source);
    }
    if (wants_reference) {
      to.reference = at::empty(from.reference.sizes(), wide.options());
      add_heads<T>(by_head.const_data_ptr<T>(), n.batch * n.queries, n.heads, levels.count * from.numbers(),
                   to.reference.mutable_data_ptr<T>());
    }
  });
  return to;
}

at::Tensor forward_cpu(const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& locations,
                       const at::Tensor& weights) {
  return forward(value, level_shapes, {locations, weights, {}});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cpu(const at::Tensor& grad_output, const at::Tensor& value,
                                                            at::IntArrayRef level_shapes, const at::Tensor& locations,
                                                            const at::Tensor& weights) {
  const Gradients to = backward(grad_output, value, level_shapes, {locations, weights, {}}, false);
  return {to.value, to.where, to.attend};
}

// Offsets and logits may be in half precision; the reference points are in the type of the sums.
SourceTensors widen(const at::Tensor& reference, const at::Tensor& offsets, const at::Tensor& logits) {
  return {offsets.to(reference.scalar_type()), logits.to(reference.scalar_type()), reference};
}

at::Tensor forward_fused_cpu(const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& reference,
                             const at::Tensor& offsets, const at::Tensor& logits) {
  return forward(value, level_shapes, widen(reference, offsets, logits));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_fused_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& reference,
    const at::Tensor& offsets, const at::Tensor& logits, bool wants_reference) {
  const Gradients to =
      backward(grad_output, value, level_shapes, widen(reference, offsets, logits), wants_reference);
  return {to.value, wants_reference ? to.reference : at::empty({0}, reference.options()), to.where, to.attend};
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
  m.def(
      "forward_fused_cpu(Tensor value, int[] level_shapes, Tensor reference, Tensor offsets, Tensor logits) -> Tensor",
      &assigndetr::forward_fused_cpu);
  m.def(
      "backward_fused_cpu(Tensor grad_output, Tensor value, int[] level_shapes, Tensor reference, Tensor offsets,"
      " Tensor logits, bool wants_reference) -> (Tensor, Tensor, Tensor, Tensor)",
      &assigndetr::backward_fused_cpu);
}
