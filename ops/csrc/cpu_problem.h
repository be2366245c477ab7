// What every build of the CPU kernels (cpu_kernels.h, one per instruction set) is given.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "projected.h"

namespace assigndetr {

// Integers as wide as T: a vector of indices then has as many lanes as one of coordinates.
template <typename T>
using IntOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// One call of the operator. Samples are the levels x points of one query and head; tables by sample are padded to whole
// vectors with levels of 1 x 1 cell.
template <typename T>
struct Problem {
  static constexpr int64_t kPad = 16;  // lanes of the widest vector

  Sizes n;
  int64_t levels, samples, padded;
  Source<T> source;
  T share;                                     // of a box, see anchor_at()
  std::vector<T> width, height;                // of the sample's level, as numbers
  std::vector<IntOf<T>> columns, rows, start;  // the same as integers, and the level's first cell
  std::vector<T> cell;                         // width and height of a cell of the sample's level, in turns
  std::vector<int64_t> order;                  // queries in the order they are to be visited; empty: as they stand

  Problem(const Levels& table, const Sizes& sizes, const Source<T>& source)
      : n(sizes),
        levels(table.count),
        samples(levels * sizes.points),
        padded((samples + kPad - 1) / kPad * kPad),
        source(source),
        share(box_share<T>(sizes.points)),
        width(padded, T(1)),
        height(padded, T(1)),
        columns(padded, 1),
        rows(padded, 1),
        start(padded, 0),
        cell(2 * padded, T(1)) {
    for (int64_t s = 0; s < samples; ++s) {
      const Level& level = table.level[s / sizes.points];
      width[s] = static_cast<T>(level.width);
      height[s] = static_cast<T>(level.height);
      columns[s] = static_cast<IntOf<T>>(level.width);
      rows[s] = static_cast<IntOf<T>>(level.height);
      start[s] = static_cast<IntOf<T>>(level.start);
      cell[2 * s] = T(1) / width[s];
      cell[2 * s + 1] = T(1) / height[s];
    }
  }
};

// The part of a call that one thread computes: queries are positions in `order`.
struct Part {
  int64_t image, first_head, last_head, first_query, last_query;
};

// Where the channels of an image lie: head h of cell s begins at h * head_stride + s * cell_stride.
struct Layout {
  int64_t cell_stride, head_stride;
};

template <typename T>
using Forward = void (*)(const Problem<T>&, const Part&, const Layout&, const T* value, T* output);

template <typename T>
using Backward = void (*)(const Problem<T>&, const Part&, const Layout&, const T* value, const T* grad_output,
                          T* grad_value, const SourceGradient<T>& grad_source);

// The kernels for one width of a head.
template <typename T>
struct Kernels {
  Forward<T> forward;
  Backward<T> backward;
};

// Kernels keep places in an image as IntOf<T>.
template <typename T>
bool places_fit(const Sizes& n) {
  return n.cells * n.heads * n.channels <= std::numeric_limits<IntOf<T>>::max();
}

// Append the queries of an encoder, one for each cell, in tiles: neighbours read the same cells, which then are still
// in the fastest cache.
inline void append_tiles(const Levels& levels, std::vector<int64_t>& order) {
  constexpr int64_t kTile = 8;
  for (int l = 0; l < levels.count; ++l) {
    const Level& level = levels.level[l];
    for (int64_t top = 0; top < level.height; top += kTile) {
      for (int64_t left = 0; left < level.width; left += kTile) {
        for (int64_t y = top; y < level.height && y < top + kTile; ++y) {
          for (int64_t x = left; x < level.width && x < left + kTile; ++x) {
            order.push_back(level.start + y * level.width + x);
          }
        }
      }
    }
  }
}

}  // namespace assigndetr
