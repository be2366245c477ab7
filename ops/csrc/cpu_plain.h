// Plain loops that compute everything, at any size and with any compiler, but slowly.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "projected.h"

namespace assigndetr {

// Locations and weights of one item at a time, for the plain loops.
template <typename T>
class Reader {
 public:
  Reader(const Source<T>& source, const Levels& levels, const Sizes& n)
      : source_(source), levels_(levels), n_(n), samples_(levels.count * n.points) {
    if (computes()) {
      where_.resize(2 * samples_);
      attend_.resize(samples_);
    }
  }

  bool computes() const { return source_.reference != nullptr; }
  const T* where(int64_t item) const { return computes() ? where_.data() : source_.where + 2 * item * samples_; }
  const T* attend(int64_t item) const { return computes() ? attend_.data() : source_.attend + item * samples_; }

  void read(int64_t item) {
    if (!computes()) {
      return;
    }
    const T* const logits = source_.attend + item * samples_;
    const T* const offsets = source_.where + 2 * item * samples_;
    const Softmax<T> softmax = softmax_of<T>(logits, samples_);
    for (int64_t s = 0; s < samples_; ++s) {
      const Anchor<T> anchor = anchor_of(item, s / n_.points);
      where_[2 * s] = anchor.x + offsets[2 * s] * anchor.scale_x;
      where_[2 * s + 1] = anchor.y + offsets[2 * s + 1] * anchor.scale_y;
      attend_[s] = softmax.weight(logits[s]);
    }
  }

  // Turn the gradients of the item's locations and weights, in `to`, into those of what they are computed from.
  void project(int64_t item, const SourceGradient<T>& to) const {
    if (!computes()) {
      return;
    }
    T* const by_weight = to.attend + item * samples_;
    T* const by_place = to.where + 2 * item * samples_;
    const T* const offsets = source_.where + 2 * item * samples_;
    T mean = 0;
    for (int64_t s = 0; s < samples_; ++s) {
      mean += attend_[s] * by_weight[s];
    }
    for (int64_t s = 0; s < samples_; ++s) {
      const int64_t level = s / n_.points;
      const Anchor<T> anchor = anchor_of(item, level);
      by_weight[s] = attend_[s] * (by_weight[s] - mean);
      for (int xy = 0; xy < 2; ++xy) {
        T& by_offset = by_place[2 * s + xy];
        if (to.reference != nullptr) {
          T* const by_reference = to.reference + (item * levels_.count + level) * source_.numbers + xy;
          *by_reference += by_offset;
          if (source_.numbers == 4) {
            by_reference[2] += by_offset * offsets[2 * s + xy] * box_share<T>(n_.points);
          }
        }
        by_offset *= xy == 0 ? anchor.scale_x : anchor.scale_y;
      }
    }
  }

 private:
  Anchor<T> anchor_of(int64_t item, int64_t level) const {
    const Level& at = levels_.level[level];
    return anchor_at(source_.reference + (item / n_.heads * levels_.count + level) * source_.numbers, source_.numbers,
                     T(1) / at.width, T(1) / at.height, box_share<T>(n_.points));
  }

  const Source<T>& source_;
  const Levels& levels_;
  const Sizes& n_;
  const int64_t samples_;
  std::vector<T> where_, attend_;
};

// Call visit(sample, corners) for every sample of one query and head that sees a cell.
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

// For compilers without vectors, and for images whose places do not fit into 32 bits.
template <typename T>
void plain_forward(const T* value, const Levels& levels, const Sizes& n, const Source<T>& source, T* output) {
  const int64_t channels = n.channels, cell_stride = n.heads * channels;
  const auto run = [&](int64_t begin, int64_t end) {
    Reader<T> reader(source, levels, n);
    for (int64_t item = begin; item < end; ++item) {  // item: (image, query, head)
      const int64_t head = item % n.heads, image = item / (n.heads * n.queries);
      const T* const base = value + image * n.cells * cell_stride + head * channels;
      T* const sum = output + item * channels;
      std::fill_n(sum, channels, T(0));
      reader.read(item);
      const T* const weights = reader.attend(item);
      for_each_sample(reader.where(item), levels, n.points, [&](int64_t sample, const Corners<T>& at) {
        for (int k = 0; k < 4; ++k) {
          const T weight = weights[sample] * at.weight[k];
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
void plain_backward(const T* grad_output, const T* value, const Levels& levels, const Sizes& n,
                    const Source<T>& source, T* grad_value, const SourceGradient<T>& grad_source) {
  const int64_t channels = n.channels, cell_stride = n.heads * channels, samples = levels.count * n.points;
  const auto run = [&](int64_t begin, int64_t end) {
    Reader<T> reader(source, levels, n);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % n.heads, image = task / n.heads;
      const int64_t base = image * n.cells * cell_stride + head * channels;
      for (int64_t query = 0; query < n.queries; ++query) {
        const int64_t item = (image * n.queries + query) * n.heads + head;
        const T* const grad = grad_output + item * channels;
        reader.read(item);
        const T* const weights = reader.attend(item);
        for_each_sample(reader.where(item), levels, n.points, [&](int64_t sample, const Corners<T>& at) {
          T by_weight = 0, by_x = 0, by_y = 0;
          for (int k = 0; k < 4; ++k) {
            const T* const cell = value + base + at.cell[k] * cell_stride;
            T* const grad_cell = grad_value + base + at.cell[k] * cell_stride;
            const T weight = weights[sample] * at.weight[k];
            T dot = 0;
            for (int64_t c = 0; c < channels; ++c) {
              dot += grad[c] * cell[c];
              grad_cell[c] += weight * grad[c];
            }
            by_weight += at.weight[k] * dot;
            by_x += at.slope_x[k] * dot;
            by_y += at.slope_y[k] * dot;
          }
          const int64_t index = item * samples + sample;
          grad_source.attend[index] = by_weight;
          grad_source.where[2 * index] = weights[sample] * by_x;
          grad_source.where[2 * index + 1] = weights[sample] * by_y;
        });
        reader.project(item, grad_source);
      }
    }
  };
  at::parallel_for(0, n.batch * n.heads, /*grain_size=*/1, run);
}

}  // namespace assigndetr
