// The fast CUDA kernels: heads of 8, 16, 24, ... 128 channels; values in float32, float16 or bfloat16, everything else
// in float32. cuda_layout.h says which lane computes what.
//
// What limits them is how many instructions a multiprocessor issues. For a query of 8 heads of 32 channels, 4 levels
// and 4 points a warp issues about 2070 of them forward in bfloat16 (1790 in float32) and 4240 (3700) backward, counted
// in the code that nvcc 13.0 makes for sm_90.
#pragma once

#include "cuda_source.h"

namespace assigndetr {

// Blocks that must fit on a multiprocessor at a time: 64 or 80 registers a thread in the forward pass, 80 or 128 in the
// backward pass. With fewer registers or no word at all the compiler spills; `python -m ops.resources` shows it.
template <typename scalar_t>
constexpr int kForwardBlocks = sizeof(scalar_t) == 2 ? 4 : 3;
template <typename scalar_t, typename Source>
constexpr int kBackwardBlocks = sizeof(scalar_t) == 2 && std::is_same_v<Source, StoredSource<float>> ? 3 : 2;

// What lane `source` of an item found.
template <int lanes>
__device__ __forceinline__ int hand_out(const Spot& spot, int source, float (&weight)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    weight[k] = __shfl_sync(kAllLanes, spot.weight[k], source, lanes);
  }
  return __shfl_sync(kAllLanes, spot.packed, source, lanes);
}

// The kernel reads the nearest cell also for corners outside the map and multiplies by 0: a value that is not finite
// may therefore show where it has no weight.
template <typename scalar_t, int lanes, typename Source>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<scalar_t>)
    fast_forward(const Plan plan, const scalar_t* __restrict__ value, const Source source,
                 scalar_t* __restrict__ output) {
  constexpr int chunk = kChunk<lanes>;
  constexpr int width = 16 / sizeof(scalar_t), vectors = kPart / width;  // loads of 16 bytes
  const int lane = threadIdx.x % lanes, part = lane < plan.parts ? lane : plan.parts - 1;
  const int channels = plan.parts * kPart;
  const unsigned cell_stride = plan.heads * channels, cell_bytes = cell_stride * sizeof(scalar_t);
  const int64_t image = blockIdx.y;
  Item item;
  for (int round = 0; round < plan.rounds; ++round) {
    if (!item_at<lanes>(plan, image, blockIdx.x, round, threadIdx.x, item)) {
      return;
    }
    // Vector v of a lane begins at channel (v * parts + part) * width: lanes side by side read side by side.
    const scalar_t* const from = value + image * plan.cells * cell_stride + item.head * channels + part * width;
    FastReader<Source, lanes> reader(plan, source, item, lane);
    float sum[kPart] = {};
    const auto add = [&](const Spot& spot, int source, int columns) {
      float weight[4];
      const int packed = hand_out<lanes>(spot, source, weight);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const scalar_t* const cell = cell_at(from, corner_cell(packed, k, columns), cell_bytes);
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
          float read[width];
          widen(load<scalar_t, width>(cell + v * plan.parts * width), read);
#pragma unroll
          for (int i = 0; i < width; ++i) {
            sum[v * width + i] += weight[k] * read[i];
          }
        }
      }
    };
    for (int l = 0; l < plan.levels; ++l) {
      const int columns = plan.level[l].width;
      const auto origin = reader.origin(plan, l);
      for (int point = 0; point < plan.points; point += chunk) {
        const Spot spot = reader.spot(plan, l, point + lane % chunk, origin);
        if (point + chunk <= plan.points) {
#pragma unroll
          for (int source = 0; source < chunk; ++source) {
            add(spot, source, columns);
          }
        } else {
#pragma unroll 1
          for (int source = 0; source < plan.points - point; ++source) {
            add(spot, source, columns);
          }
        }
      }
    }
    if (item.active && lane < plan.parts) {
      scalar_t* const to = output + item.index * channels + part * width;
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        Vec<scalar_t, width> written;
#pragma unroll
        for (int i = 0; i < width; ++i) {
          written.at[i] = static_cast<scalar_t>(sum[v * width + i]);
        }
        *reinterpret_cast<Vec<scalar_t, width>*>(to + v * plan.parts * width) = written;
      }
    }
  }
}

// Sum over the lanes of an item. Each lane is left, in sums[0], with those of its own sample: it hands half of what it
// has to a neighbour and takes over the other half, then a quarter, ...
template <int lanes, int chunk>
__device__ __forceinline__ void sum_lanes(float (&sums)[chunk][4], int lane) {
#pragma unroll
  for (int half = chunk / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float given = upper ? sums[i][k] : sums[i + half][k];
        const float kept = upper ? sums[i + half][k] : sums[i][k];
        sums[i][k] = kept + __shfl_xor_sync(kAllLanes, given, half);
      }
    }
  }
#pragma unroll
  for (int distance = chunk; distance < lanes; distance *= 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sums[0][k] += __shfl_xor_sync(kAllLanes, sums[0][k], distance);
    }
  }
}

// The gradient of the output for the channels of a lane, in two orders.
template <typename scalar_t, bool by_four>
struct LaneGradient {
  float read[kPart];   // vector v of 4 begins at channel (v * parts + lane) * 4, as the values are read
  float added[kPart];  // in the order of the additions: the same or, added singly, channels i * parts + lane

  __device__ __forceinline__ LaneGradient(const scalar_t* from, int lane, int parts, bool active) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const Vec<scalar_t, 4> four = load<scalar_t, 4>(from + (v * parts + lane) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        read[4 * v + i] = active ? static_cast<float>(four.at[i]) : 0.0f;
        added[4 * v + i] = by_four ? read[4 * v + i] : static_cast<float>(from[(4 * v + i) * parts + lane]);
      }
    }
  }
};

// The first of the channels that a lane adds to.
template <typename Sums>
__device__ __forceinline__ int first_added(int lane) {
  return Sums::by_four ? 4 * lane : lane;
}

// Add the gradient times `weight` to a cell, from the first channel of the lane on.
template <typename Sums, typename scalar_t>
__device__ __forceinline__ void add_gradient(typename Sums::Number* to, float scale,
                                             const LaneGradient<scalar_t, Sums::by_four>& grad, float weight,
                                             int parts) {
  if constexpr (Sums::by_four) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      Vec<float, 4> four;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        four.at[i] = weight * grad.added[4 * v + i];
      }
      Sums::add_four(to + v * parts * 4, four);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {  // neighbouring lanes add to neighbouring channels
      Sums::add(to + i * parts, weight * grad.added[i], scale);
    }
  }
}

// All gradients of the source are written; those of the values are added to `sums`, which are 0 before.
template <typename scalar_t, int lanes, typename Source, typename Sums>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<scalar_t, Source>)
    fast_backward(const Plan plan, const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ value,
                  const Source source, const Sums sums, const typename Source::Gradient grad_source) {
  constexpr int chunk = kChunk<lanes>;
  const int lane = threadIdx.x % lanes, part = lane < plan.parts ? lane : plan.parts - 1;
  const int channels = plan.parts * kPart;
  const unsigned cell_stride = plan.heads * channels;
  const unsigned cell_bytes = cell_stride * sizeof(scalar_t), sum_bytes = cell_stride * sizeof(typename Sums::Number);
  const float scale = sums.scale();
  const int64_t image = blockIdx.y;
  Item item;
  for (int round = 0; round < plan.rounds; ++round) {
    if (!item_at<lanes>(plan, image, blockIdx.x, round, threadIdx.x, item)) {
      return;
    }
    const bool active = item.active && lane < plan.parts;
    const int64_t head = image * plan.cells * cell_stride + item.head * channels;
    const scalar_t* const from = value + head + part * 4;
    typename Sums::Number* const to = sums.to + head + first_added<Sums>(part);
    FastReader<Source, lanes> reader(plan, source, item, lane);
    FastWriter<Source, lanes> writer(grad_source);
    const LaneGradient<scalar_t, Sums::by_four> grad(grad_output + item.index * channels, part, plan.parts, active);
    for (int l = 0; l < plan.levels; ++l) {
      const int columns = plan.level[l].width;
      for (int first = 0; first < plan.points; first += chunk) {
        const int point = first + lane % chunk;
        const Spot spot = reader.spot(plan, l, point, reader.template origin<true>(plan, l));
        float dots[chunk][4] = {};
#pragma unroll
        for (int source = 0; source < chunk; ++source) {
          if (first + source < plan.points) {  // the same for the whole warp
            float weight[4];
            const int packed = hand_out<lanes>(spot, source, weight);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const unsigned cell = corner_cell(packed, k, columns);
              const scalar_t* const own = cell_at(from, cell, cell_bytes);
#pragma unroll
              for (int v = 0; v < 2; ++v) {
                float read[4];
                widen(load<scalar_t, 4>(own + v * plan.parts * 4), read);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  dots[source][k] += grad.read[4 * v + i] * read[i];
                }
              }
              if (active && weight[k] != 0.0f) {
                add_gradient<Sums>(cell_at(to, cell, sum_bytes), scale, grad, weight[k], plan.parts);
              }
            }
          }
        }
        sum_lanes<lanes>(dots, lane);
        writer.put(plan, reader, item, spot, dots[0], l, point, lane);
      }
    }
    writer.end_item(plan, reader, item, lane);
  }
}

}  // namespace assigndetr
