// The CUDA kernels for any width of a head, any number of levels and any type of values. T is the type of the sums.
#pragma once

#include "cuda_source.h"

namespace assigndetr {

// One thread per output element; neighbouring threads read neighbouring channels.
template <typename scalar_t, typename T, typename Source>
__global__ void __launch_bounds__(kThreads)
    generic_forward(const scalar_t* __restrict__ value, const Levels levels, const Sizes n, const Source source,
                    scalar_t* __restrict__ output) {
  const int64_t cell_stride = n.heads * n.channels, samples = levels.count * n.points;
  const int64_t total = n.batch * n.queries * cell_stride, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < total; index += step) {
    const int64_t item = index / n.channels;  // (image, query, head)
    const int64_t channel = index % n.channels, head = item % n.heads, image = item / (n.heads * n.queries);
    const scalar_t* const base = value + image * n.cells * cell_stride + head * n.channels + channel;
    GenericReader<Source> reader(levels, n, source, item);
    int64_t sample = item * samples;
    T sum = 0;
    for (int l = 0; l < levels.count; ++l) {
      reader.begin(levels, l);
      for (int64_t p = 0; p < n.points; ++p, ++sample) {
        Corners<T> at;
        if (reader.find(sample, levels.level[l], at)) {
          T read = 0;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            read += at.weight[k] * static_cast<T>(base[at.cell[k] * cell_stride]);
          }
          sum += reader.weight(sample) * read;
        }
      }
    }
    output[index] = static_cast<scalar_t>(sum);
  }
}

constexpr int kGenericLanes = 8;

// 8 threads of a warp share one (image, query, head) and go over its channels together. The gradients of samples are
// sums over channels, taken by shuffles.
template <typename scalar_t, typename T, typename Source, typename Sums>
__global__ void __launch_bounds__(kThreads, 2)
    generic_backward(const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ value, const Levels levels,
                     const Sizes n, const Source source, const Sums sums,
                     const typename Source::Gradient grad_source) {
  constexpr int lanes = kGenericLanes;
  const int64_t cell_stride = n.heads * n.channels, samples = levels.count * n.points;
  const int64_t total = n.batch * n.queries * n.heads;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.x / lanes;
  const int lane = threadIdx.x % lanes;
  const T scale = sums.scale();
  // The loop bound is the same for a whole warp, so that all its threads meet in the shuffles.
  const int64_t warp_first = thread / kWarp * (kWarp / lanes);
  for (int64_t first = warp_first; first < total; first += step) {
    const int64_t wanted = first + (threadIdx.x % kWarp) / lanes;
    const bool active = wanted < total;
    const int64_t item = active ? wanted : total - 1;
    const int64_t head = item % n.heads, image = item / (n.heads * n.queries);
    const int64_t base = image * n.cells * cell_stride + head * n.channels;
    const scalar_t* const grad = grad_output + item * n.channels;
    GenericReader<Source> reader(levels, n, source, item);
    GenericWriter<Source> writer(grad_source);
    int64_t sample = item * samples;
    for (int l = 0; l < levels.count; ++l) {
      reader.begin(levels, l);
      for (int64_t p = 0; p < n.points; ++p, ++sample) {
        Corners<T> at;
        T by_weight = 0, by_x = 0, by_y = 0;
        const T a = reader.weight(sample);
        if (active && reader.find(sample, levels.level[l], at)) {
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
              Sums::add(sums.to + cell, a * at.weight[k] * g, scale);
            }
          }
        }
#pragma unroll
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
          by_weight += __shfl_xor_sync(0xffffffffu, by_weight, distance);
          by_x += __shfl_xor_sync(0xffffffffu, by_x, distance);
          by_y += __shfl_xor_sync(0xffffffffu, by_y, distance);
        }
        if (active && lane == 0) {
          writer.put(reader, sample, a, by_weight, a * by_x, a * by_y);
        }
      }
      if (active && lane == 0) {
        writer.end_level(reader, levels, item, l);
      }
    }
    if (active && lane == 0) {
      writer.end_item(reader, item * samples, samples);
    }
  }
}

}  // namespace assigndetr
