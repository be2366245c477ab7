// Which thread computes what in the fast CUDA kernels (cuda_fast.h): index arithmetic only, without PyTorch and without
// anything a compiler for the host does not know.
//
// An item is one query and head of one image. A lane takes 8 channels of it, so as many neighbouring lanes of a warp as
// a head has parts of 8 channels (rounded up to a power of two) share an item. With 8 heads of 32 channels a warp takes
// all heads of one query.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "bilinear.h"

namespace assigndetr {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPart = 8;  // channels of a lane
constexpr int kMaxLanes = 16;
constexpr int kFastLevels = 16;
constexpr int kMaxImages = 65535;  // rows of a grid
constexpr int kTile = 8;             // queries of an encoder are visited in tiles of kTile x kTile
constexpr int kEnoughBlocks = 1024;  // more blocks than the largest cards run at a time

struct FastLevel {
  int height, width, start;
  float cell_x, cell_y;  // size of a cell, where the map has 1
};

// One call of a fast kernel; its argument.
struct Plan {
  FastLevel level[kFastLevels];
  int levels, points, heads, queries, parts;
  int rounds;  // items a warp takes one after the other, for each of its lane groups
  bool tiles;
  int64_t batch, cells;
};

inline int lanes_for(int64_t parts) {
  int lanes = 1;
  while (lanes < parts) {
    lanes *= 2;
  }
  return lanes;
}

// Make the plan. False if the fast kernels cannot compute the call: they keep places within an image in 32 bits.
inline bool make_plan(const Levels& levels, const Sizes& n, Plan& plan) {
  const int64_t parts = n.channels / kPart, limit = int64_t(1) << 29;  // cells are multiplied by 4, see Spot
  if (n.channels % kPart != 0 || parts < 1 || parts > kMaxLanes || levels.count > kFastLevels || n.cells >= limit ||
      n.heads < 1 || n.heads >= limit / n.channels || n.queries >= limit / n.heads || n.points < 1 ||
      n.points >= limit / kFastLevels || n.batch > kMaxImages) {
    return false;
  }
  for (int l = 0; l < levels.count; ++l) {
    const Level& level = levels.level[l];
    plan.level[l] = {static_cast<int>(level.height), static_cast<int>(level.width), static_cast<int>(level.start),
                     1.0f / static_cast<float>(level.width), 1.0f / static_cast<float>(level.height)};
  }
  plan.levels = levels.count;
  plan.points = static_cast<int>(n.points);
  plan.heads = static_cast<int>(n.heads);
  plan.queries = static_cast<int>(n.queries);
  plan.parts = static_cast<int>(parts);
  plan.tiles = n.queries == n.cells;
  plan.batch = n.batch;
  plan.cells = n.cells;
  // A block that takes a whole tile finds most of its cells in the cache of its multiprocessor. With few queries, all
  // multiprocessors having work counts more.
  const int64_t warps = n.batch * n.queries * n.heads * lanes_for(parts) / kWarp;
  plan.rounds = 1;
  while (plan.rounds < kTile && warps >= int64_t(kWarps) * kEnoughBlocks * 2 * plan.rounds) {
    plan.rounds *= 2;
  }
  return true;
}

// Blocks for the items of an image.
inline int64_t blocks_per_image(const Plan& plan) {
  const int64_t per_block = int64_t(kThreads) / lanes_for(plan.parts) * plan.rounds;
  return (int64_t(plan.queries) * plan.heads + per_block - 1) / per_block;
}

// The query at a position when the cells of the levels are visited in tiles, row by row of tiles and within a tile.
ASSIGNDETR_HD int tile_query(const Plan& plan, int position) {
  int l = 0;
  while (l + 1 < plan.levels && position >= plan.level[l + 1].start) {
    ++l;
  }
  const FastLevel& level = plan.level[l];
  const unsigned width = level.width, height = level.height;
  unsigned rest = position - level.start;
  const unsigned row = rest / (kTile * width);  // of tiles
  rest -= row * kTile * width;
  const unsigned rows = height - row * kTile < kTile ? height - row * kTile : kTile;  // of cells, in this row of tiles
  const unsigned column = rest / (kTile * rows);
  rest -= column * kTile * rows;
  const unsigned columns = width - column * kTile < kTile ? width - column * kTile : kTile;
  const unsigned y = row * kTile + rest / columns, x = column * kTile + rest % columns;
  return level.start + static_cast<int>(y * width + x);
}

struct Item {
  int64_t index;  // image, query, head as one number
  int query, head;
  bool active;  // there is one: the last warp has lanes without
};

// The item of a lane. False, for all lanes of a warp together, if none of them has one.
template <int lanes>
ASSIGNDETR_HD bool item_at(const Plan& plan, int64_t image, unsigned block, int round, int thread, Item& item) {
  const int64_t warp = (int64_t(block) * plan.rounds + round) * kWarps + thread / kWarp;
  const int64_t first = warp * (kWarp / lanes), count = int64_t(plan.queries) * plan.heads;
  if (first >= count) {
    return false;
  }
  const unsigned wanted = static_cast<unsigned>(first) + thread % kWarp / lanes;
  const unsigned last = static_cast<unsigned>(count - 1);
  item.active = wanted <= last;
  const unsigned number = item.active ? wanted : last, position = number / plan.heads;
  item.head = static_cast<int>(number - position * plan.heads);
  item.query = plan.tiles ? tile_query(plan, static_cast<int>(position)) : static_cast<int>(position);
  item.index = (image * plan.queries + item.query) * plan.heads + item.head;
  return true;
}

// Where a sample lies. Corners: upper left, upper right, lower left, lower right. Those outside the map have weight 0
// and stand for the nearest cell of the map, so that reading them needs no branch.
struct Spot {
  int packed;                   // 4 * upper left cell, + 1 if the right ones are other cells, + 2 if the lower ones are
  float weight[4];              // attention weight times bilinear weight
  float attention, right, low;  // distances from the left and the upper corners, in cells
  int inside;                   // a bit for each corner
};

// The sample at normalised (x, y): locate() of bilinear.h with small integers.
ASSIGNDETR_HD Spot spot_at(float x, float y, float attention, const FastLevel& level) {
  const float width = static_cast<float>(level.width), height = static_cast<float>(level.height);
  const float px = x * width - 0.5f, py = y * height - 0.5f;
  const bool seen = px > -1.0f && py > -1.0f && px < width && py < height;  // false if x or y is not finite
  const float floor_x = seen ? std::floor(px) : 0.0f, floor_y = seen ? std::floor(py) : 0.0f;
  const int left = static_cast<int>(floor_x), top = static_cast<int>(floor_y);
  const bool left_in = seen && left >= 0, right_in = seen && left + 1 < level.width;
  const bool up_in = seen && top >= 0, low_in = seen && top + 1 < level.height;
  Spot spot;
  spot.packed = 4 * (level.start + (top < 0 ? 0 : top) * level.width + (left < 0 ? 0 : left)) +
                (left_in && right_in ? 1 : 0) + (up_in && low_in ? 2 : 0);
  spot.attention = attention;
  spot.right = seen ? px - floor_x : 0.0f;
  spot.low = seen ? py - floor_y : 0.0f;
  const float up = up_in ? attention * (1.0f - spot.low) : 0.0f, down = low_in ? attention * spot.low : 0.0f;
  spot.weight[0] = left_in ? up * (1.0f - spot.right) : 0.0f;
  spot.weight[1] = right_in ? up * spot.right : 0.0f;
  spot.weight[2] = left_in ? down * (1.0f - spot.right) : 0.0f;
  spot.weight[3] = right_in ? down * spot.right : 0.0f;
  spot.inside = (left_in && up_in ? 1 : 0) + (right_in && up_in ? 2 : 0) + (left_in && low_in ? 4 : 0) +
                (right_in && low_in ? 8 : 0);
  return spot;
}

// The cell of a corner, from Spot::packed.
ASSIGNDETR_HD unsigned corner_cell(int packed, int corner, int width) {
  const unsigned cell = static_cast<unsigned>(packed) >> 2;
  return cell + (corner & 1 ? packed & 1 : 0) + (corner & 2 && packed & 2 ? width : 0);
}

struct SampleGradient {
  float weight, x, y;
};

// The gradient of a sample from the products of the output's gradient with its corners.
ASSIGNDETR_HD SampleGradient sample_gradient(const Spot& spot, const float (&dots)[4], const FastLevel& level) {
  float dot[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    dot[k] = spot.inside >> k & 1 ? dots[k] : 0.0f;
  }
  const float upper = dot[0] * (1.0f - spot.right) + dot[1] * spot.right;
  const float lower = dot[2] * (1.0f - spot.right) + dot[3] * spot.right;
  const float to_right = (dot[1] - dot[0]) * (1.0f - spot.low) + (dot[3] - dot[2]) * spot.low;
  return {upper * (1.0f - spot.low) + lower * spot.low, spot.attention * level.width * to_right,
          spot.attention * level.height * (lower - upper)};
}

// Sums in fixed point are sums of integers: they come out the same in any order. A number is multiplied by
// 2^fixed_exponent and rounded. At most 2^log_count numbers, none larger than largest_grad * largest_weight, then stay
// below 2^62 together.
template <typename T>
ASSIGNDETR_HD int fixed_exponent(T largest_grad, T largest_weight, int log_count) {
  int of_grad = 0, of_weight = 0;
  std::frexp(largest_grad, &of_grad);  // largest_grad < 2^of_grad
  std::frexp(largest_weight, &of_weight);
  constexpr int limit = std::numeric_limits<T>::max_exponent - 2;  // 2^limit and 2^-limit are numbers of T
  const int exponent = 62 - log_count - of_grad - of_weight;
  return exponent < -limit ? -limit : (exponent > limit ? limit : exponent);
}

// A log_count with room for all that may be added to one number: `points` samples of every query look at one level, and
// each adds to a cell once.
inline int log_of_count(const Sizes& n) {
  int log = 0;
  while (log < 40 && (int64_t(1) << log) / n.points < n.queries + 1) {
    ++log;
  }
  return log;
}

}  // namespace assigndetr
