// The CUDA kernels as functions for the CPU, called by tests/ops/emulated_cuda.py.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <string>

#include "emulated_cuda.h"
#include "cuda_launch.h"

using namespace assigndetr;

namespace {

// shapes: h, w of each level. sizes: batch, cells, queries, heads, channels, points.
struct Call {
  Levels levels{};
  Sizes n;

  Call(const int64_t* shapes, int64_t count, const int64_t* sizes)
      : n{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]} {
    int64_t start = 0;
    for (levels.count = 0; levels.count < count; ++levels.count) {
      const int64_t h = shapes[2 * levels.count], w = shapes[2 * levels.count + 1];
      levels.level[levels.count] = {h, w, start};
      start += h * w;
    }
  }
};

// Call visit with pointers of the type of values and of that of sums.
template <typename Visit>
const char* with_types(int type, const Visit& visit) {
  try {
    switch (type) {
      case 0:
        visit(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
        break;
      case 1:
        visit(static_cast<c10::Half*>(nullptr), static_cast<float*>(nullptr));
        break;
      case 2:
        visit(static_cast<c10::BFloat16*>(nullptr), static_cast<float*>(nullptr));
        break;
      default:
        visit(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    }
  } catch (const std::exception& error) {
    static std::string message;
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

template <typename T>
T* of(void* address) {
  return static_cast<T*>(address);
}

template <typename V, typename T, typename Source>
void run_backward(const Call& call, void* grad_output, void* value, const Source& source,
                  const typename Source::Gradient& grad_source, void* grad_value, void* fixed, void* largest_grad,
                  void* largest_weight) {
  const auto run = [&](const auto& sums) {
    launch_backward<V, T>(of<V>(grad_output), of<V>(value), call.levels, call.n, source, sums, grad_source, 0);
  };
  if (fixed == nullptr) {
    return run(PlainSums<T>{of<T>(grad_value)});
  }
  const FixedSums<T> sums{of<Fixed>(fixed), of<T>(largest_grad), of<T>(largest_weight), log_of_count(call.n)};
  run(sums);
  launch_fixed_to_float(sums, call.n.batch * call.n.cells * call.n.heads * call.n.channels, of<T>(grad_value), 0);
}

}  // namespace

extern "C" {

// Run a kernel that is wrong: half of a warp leaves before a shuffle. 1 if that is noticed.
int split_warp() {
  const auto wrong = [] {
    if (threadIdx.x % kWarp < kWarp / 2) {
      __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    }
  };
  try {
    emulated::launch(wrong, dim3(1), kWarp)();
  } catch (const std::logic_error&) {
    return 1;
  }
  return 0;
}

// What a call takes: 0 for the generic kernels, else the lanes of an item. With `rounds`, `tiles`.
int plan_of(const int64_t* shapes, int64_t count, const int64_t* sizes, int* rounds, int* tiles, int64_t* blocks) {
  const Call call(shapes, count, sizes);
  Plan plan;
  if (!make_plan(call.levels, call.n, plan)) {
    return 0;
  }
  *rounds = plan.rounds;
  *tiles = plan.tiles;
  *blocks = blocks_per_image(plan);
  return lanes_for(plan.parts);
}

// The index (image, query, head) that each lane group of each warp takes, in the order of warps and rounds.
int64_t items_of(const int64_t* shapes, int64_t count, const int64_t* sizes, int64_t image, int rounds,
                 int64_t* items) {
  const Call call(shapes, count, sizes);
  Plan plan;
  if (!make_plan(call.levels, call.n, plan)) {
    return -1;
  }
  plan.rounds = rounds;
  int64_t found = 0;
  with_lanes(plan, [&](auto lanes) {
    for (unsigned block = 0; block < blocks_per_image(plan); ++block) {
      for (int round = 0; round < plan.rounds; ++round) {
        for (int thread = 0; thread < kThreads; thread += decltype(lanes)::value) {
          Item item;
          if (item_at<decltype(lanes)::value>(plan, image, block, round, thread, item) && item.active) {
            items[found++] = item.index;
          }
        }
      }
    }
  });
  return found;
}

const char* forward(int type, void* value, const int64_t* shapes, int64_t count, const int64_t* sizes, void* locations,
                    void* weights, void* output) {
  const Call call(shapes, count, sizes);
  return with_types(type, [&](auto* like_value, auto* like_sum) {
    using V = std::remove_pointer_t<decltype(like_value)>;
    using T = std::remove_pointer_t<decltype(like_sum)>;
    const StoredSource<T> source{of<T>(locations), of<T>(weights)};
    launch_forward<V, T>(of<V>(value), call.levels, call.n, source, of<V>(output), 0);
  });
}

// `numbers`: of a reference point.
const char* forward_fused(int type, void* value, const int64_t* shapes, int64_t count, const int64_t* sizes,
                          int numbers, void* reference, void* offsets, void* logits, void* output) {
  const Call call(shapes, count, sizes);
  return with_types(type, [&](auto* like_value, auto* like_sum) {
    using V = std::remove_pointer_t<decltype(like_value)>;
    using T = std::remove_pointer_t<decltype(like_sum)>;
    const FusedSource<V, T> source{of<V>(offsets), of<V>(logits), of<T>(reference), numbers,
                                   box_share<T>(call.n.points)};
    launch_forward<V, T>(of<V>(value), call.levels, call.n, source, of<V>(output), 0);
  });
}

// `fixed`: memory for sums in fixed point, all 0, and then the largest gradient and weight; null for plain sums.
const char* backward(int type, void* grad_output, void* value, const int64_t* shapes, int64_t count,
                     const int64_t* sizes, void* locations, void* weights, void* grad_value, void* grad_locations,
                     void* grad_weights, void* fixed, void* largest_grad, void* largest_weight) {
  const Call call(shapes, count, sizes);
  return with_types(type, [&](auto* like_value, auto* like_sum) {
    using V = std::remove_pointer_t<decltype(like_value)>;
    using T = std::remove_pointer_t<decltype(like_sum)>;
    const StoredSource<T> source{of<T>(locations), of<T>(weights)};
    run_backward<V, T>(call, grad_output, value, source, {of<T>(grad_locations), of<T>(grad_weights)}, grad_value,
                       fixed, largest_grad, largest_weight);
  });
}

// `grad_reference` is by head, or null.
const char* backward_fused(int type, void* grad_output, void* value, const int64_t* shapes, int64_t count,
                           const int64_t* sizes, int numbers, void* reference, void* offsets, void* logits,
                           void* grad_value, void* grad_reference, void* grad_offsets, void* grad_logits, void* fixed,
                           void* largest_grad, void* largest_weight) {
  const Call call(shapes, count, sizes);
  return with_types(type, [&](auto* like_value, auto* like_sum) {
    using V = std::remove_pointer_t<decltype(like_value)>;
    using T = std::remove_pointer_t<decltype(like_sum)>;
    const FusedSource<V, T> source{of<V>(offsets), of<V>(logits), of<T>(reference), numbers,
                                   box_share<T>(call.n.points)};
    run_backward<V, T>(call, grad_output, value, source,
                       {of<V>(grad_offsets), of<T>(grad_logits), of<T>(grad_reference)}, grad_value, fixed,
                       largest_grad, largest_weight);
  });
}
}
