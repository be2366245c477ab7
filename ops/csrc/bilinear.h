// What the CPU and CUDA kernels share: the levels and the four neighbours of a sample. Deformable DETR, equation (3).
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ASSIGNDETR_HD __host__ __device__ __forceinline__
#else
#define ASSIGNDETR_HD inline
#endif

namespace assigndetr {

constexpr int kMaxLevels = 128;  // the table is passed to CUDA kernels by value; their arguments are limited to 4 KB

struct Level {
  int64_t height, width, start;  // start: index of the level's first cell
};

struct Levels {
  int count;
  Level level[kMaxLevels];
};

// Sizes of one call: images, cells of all levels, queries, heads, channels of a head, samples per head and level.
struct Sizes {
  int64_t batch, cells, queries, heads, channels, points;
};

// The four cells around a sample. Cells outside the map have weight and slopes 0 and a clamped, readable index, so the
// loops over channels need no branch.
template <typename T>
struct Corners {
  int64_t cell[4];
  T weight[4];   // the sample is sum(weight * value[cell])
  T slope_x[4];  // its derivative by x, in 1 / normalised units, is sum(slope_x * value[cell])
  T slope_y[4];
};

// Fill the corners of the sample at normalised (x, y). False if the sample sees no cell, also if x or y is not finite.
template <typename T>
ASSIGNDETR_HD bool locate(T x, T y, const Level& level, Corners<T>& corners) {
  const T width = static_cast<T>(level.width), height = static_cast<T>(level.height);
  const T px = x * width - T(0.5), py = y * height - T(0.5);
  if (!(px > T(-1) && py > T(-1) && px < width && py < height)) {
    return false;
  }
  const T floor_x = std::floor(px), floor_y = std::floor(py);
  const T right = px - floor_x, low = py - floor_y;
  const int64_t left_x = static_cast<int64_t>(floor_x), top_y = static_cast<int64_t>(floor_y);
  for (int k = 0; k < 4; ++k) {
    const int dx = k & 1, dy = k >> 1;
    const int64_t cx = left_x + dx, cy = top_y + dy;
    const bool inside = cx >= 0 && cx < level.width && cy >= 0 && cy < level.height;
    const T wx = dx ? right : T(1) - right, wy = dy ? low : T(1) - low;
    const int64_t near_x = cx < 0 ? 0 : (cx < level.width ? cx : level.width - 1);
    const int64_t near_y = cy < 0 ? 0 : (cy < level.height ? cy : level.height - 1);
    corners.cell[k] = level.start + near_y * level.width + near_x;
    corners.weight[k] = inside ? wx * wy : T(0);
    corners.slope_x[k] = inside ? (dx ? wy : -wy) * width : T(0);
    corners.slope_y[k] = inside ? (dy ? wx : -wx) * height : T(0);
  }
  return true;
}

}  // namespace assigndetr
