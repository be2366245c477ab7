// Choosing and launching the CUDA kernels on plain memory: no PyTorch here, so that tests can compile and run them
// alone.
// The includer defines ASSIGNDETR_LAUNCH(kernel, grid, stream), which launches blocks of kThreads threads.
#pragma once

#include <type_traits>

#include "cuda_fast.h"
#include "cuda_generic.h"
#include "cuda_grid.h"

namespace assigndetr {

inline dim3 plan_grid(const Plan& plan) {
  return dim3(static_cast<unsigned>(blocks_per_image(plan)), static_cast<unsigned>(plan.batch));
}

// Call visit(std::integral_constant) with the lanes of an item.
template <typename Visit>
void with_lanes(const Plan& plan, const Visit& visit) {
  switch (lanes_for(plan.parts)) {
    case 1:
      return visit(std::integral_constant<int, 1>());
    case 2:
      return visit(std::integral_constant<int, 2>());
    case 4:
      return visit(std::integral_constant<int, 4>());
    case 8:
      return visit(std::integral_constant<int, 8>());
    default:
      return visit(std::integral_constant<int, kMaxLanes>());
  }
}

template <typename scalar_t, typename T, typename Source, typename Stream>
void launch_forward(const scalar_t* value, const Levels& levels, const Sizes& n, const Source& source,
                    scalar_t* output, Stream stream) {
  if constexpr (std::is_same_v<T, float>) {
    Plan plan;
    if (aligned(value) && aligned(output) && source.is_aligned() && make_plan(levels, n, plan)) {
      return with_lanes(plan, [&](auto lanes) {
        ASSIGNDETR_LAUNCH((fast_forward<scalar_t, decltype(lanes)::value, Source>), plan_grid(plan), stream)
        (plan, value, source, output);
      });
    }
  }
  ASSIGNDETR_LAUNCH((generic_forward<scalar_t, T, Source>), plain_grid(n.batch * n.queries * n.heads * n.channels),
                    stream)
  (value, levels, n, source, output);
}

template <typename scalar_t, typename T, typename Source, typename Sums, typename Stream>
void launch_backward(const scalar_t* grad_output, const scalar_t* value, const Levels& levels, const Sizes& n,
                     const Source& source, const Sums& sums, const typename Source::Gradient& grad_source,
                     Stream stream) {
  if constexpr (std::is_same_v<T, float>) {
    Plan plan;
    if (aligned(value) && aligned(grad_output) && aligned(sums.to) && source.is_aligned() &&
        grad_source.is_aligned() && make_plan(levels, n, plan)) {
      return with_lanes(plan, [&](auto lanes) {
        ASSIGNDETR_LAUNCH((fast_backward<scalar_t, decltype(lanes)::value, Source, Sums>), plan_grid(plan), stream)
        (plan, grad_output, value, source, sums, grad_source);
      });
    }
  }
  ASSIGNDETR_LAUNCH((generic_backward<scalar_t, T, Source, Sums>),
                    plain_grid(n.batch * n.queries * n.heads * kGenericLanes), stream)
  (grad_output, value, levels, n, source, sums, grad_source);
}

template <typename T, typename Stream>
void launch_fixed_to_float(const FixedSums<T>& sums, int64_t count, T* result, Stream stream) {
  ASSIGNDETR_LAUNCH((fixed_to_float<T>), plain_grid(count), stream)(sums, count, result);
}

}  // namespace assigndetr
