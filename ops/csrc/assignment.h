// The cheapest assignment of slots to targets that may take several each, on the host. Nothing of PyTorch in here.
//
// Shortest augmenting paths with prices (Jonker and Volgenant 1987; Crouse 2016, as in SciPy), on targets that are not
// copied: all copies of a target would have the same price, so that a search needs to look from one of them only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "problem.h"
#include "vector_code.h"

namespace assigndetr {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kChunk = 64;  // columns of which the least distance is written down: a short way to the nearest one
constexpr int64_t kLanes = 16, kDepth = 4;  // a block of block_minima is kDepth numbers, kLanes apart

template <bool first, typename Count>
ASSIGNDETR_INLINE double relax_chunk(const float* cost, const double* price, double offset, double* distance,
                                     Count count) {
  double least = kInfinity;
#pragma omp simd reduction(min : least)
  for (int64_t j = 0; j < count; ++j) {
    const double found = (static_cast<double>(cost[j]) - price[j]) + offset;
    const double before = first ? kInfinity : distance[j];
    const double d = found < before ? found : before;
    distance[j] = d;
    least = d < least ? d : least;
  }
  return least;
}

template <bool first>
ASSIGNDETR_INLINE double relax(const float* cost, const double* price, double offset, double* distance, double* chunks,
                               int64_t width) {
  double least = kInfinity;
  int64_t j = 0;
  for (; j + kChunk <= width; j += kChunk) {
    const std::integral_constant<int64_t, kChunk> count;  // known to the compiler
    *chunks = relax_chunk<first>(cost + j, price + j, offset, distance + j, count);
    least = std::min(least, *chunks++);
  }
  if (j < width) {
    *chunks = relax_chunk<first>(cost + j, price + j, offset, distance + j, width - j);
    least = std::min(least, *chunks);
  }
  return least;
}

// Write cost - price + offset as the distance of every column, and the least of each chunk; return the least of all.
ASSIGNDETR_VECTOR_CODE static double relax_first(const float* cost, const double* price, double offset,
                                                 double* distance, double* chunks, int64_t width) {
  return relax<true>(cost, price, offset, distance, chunks, width);
}

// The same, where it is less than the distance so far.
ASSIGNDETR_VECTOR_CODE static double relax_more(const float* cost, const double* price, double offset,
                                                double* distance, double* chunks, int64_t width) {
  return relax<false>(cost, price, offset, distance, chunks, width);
}

// Write the least number of every block, each number of the remainder as a block of its own. Return how many.
ASSIGNDETR_VECTOR_CODE static int64_t block_minima(const float* row, int64_t width, float* minima) {
  const int64_t blocks = width / (kLanes * kDepth), rest = blocks * kLanes * kDepth;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* const r = row + b * kLanes * kDepth;
    float* const out = minima + b * kLanes;
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float x = r[lane], y = r[lane + kLanes], z = r[lane + 2 * kLanes], w = r[lane + 3 * kLanes];
      const float xy = y < x ? y : x, zw = w < z ? w : z;
      out[lane] = zw < xy ? zw : xy;
    }
  }
  std::copy(row + rest, row + width, minima + blocks * kLanes);
  return blocks * kLanes + width - rest;
}

// Return the column of the least number, the first one of equals.
ASSIGNDETR_VECTOR_CODE static int64_t least_column(const float* row, int64_t width) {
  float least = std::numeric_limits<float>::infinity();
  int64_t where = 0;
  for (int64_t begin = 0; begin < width; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, width);
    float low = std::numeric_limits<float>::infinity();
#pragma omp simd reduction(min : low)
    for (int64_t j = begin; j < end; ++j) {
      low = row[j] < low ? row[j] : low;
    }
    if (low < least) {
      least = low;
      where = begin;
    }
  }
  while (where < width && row[where] != least) {
    ++where;
  }
  return where;
}

// Solves one problem after the other and keeps its memory. What was solved before has no influence.
class AssignmentSolver {
 public:
  // Write problem.pairs() pairs, slots ascending.
  void solve(const Problem& problem, int64_t* slots, int64_t* targets) {
    if (problem.pairs() == 0) {
      return;
    }
    if (problem.targets * problem.repeat > problem.slots) {
      solve_crowded(problem, slots, targets);
      return;
    }
    solve_wide(problem);
    for (int64_t s = 0; s < problem.slots; ++s) {
      if (owner_[s] >= 0) {
        *slots++ = s;
        *targets++ = owner_[s];
      }
    }
  }

 private:
  struct Closed {  // a column that the search has passed
    int32_t column;
    double price, distance;
  };

  // Not enough slots: every slot gets a target. Let the slots choose among copies of the targets.
  void solve_crowded(const Problem& problem, int64_t* slots, int64_t* targets) {
    const int64_t copies = problem.targets * problem.repeat;
    turned_.resize(problem.slots * copies);
    for (int64_t s = 0; s < problem.slots; ++s) {
      for (int64_t c = 0; c < copies; ++c) {
        turned_[s * copies + c] = problem.cost[c % problem.targets * problem.stride + s];
      }
    }
    solve_wide({turned_.data(), problem.slots, copies, copies, 1});
    for (int64_t c = 0; c < copies; ++c) {
      if (const int32_t s = owner_[c]; s >= 0) {
        slots[s] = s;
        targets[s] = c % problem.targets;
      }
    }
  }

  // Every target gets all slots it may have. Leaves the result in owner_.
  //
  // Invariant: cost - price_[slot] - level_[target] >= 0, and = 0 for pairs; prices are <= 0, and 0 without owner.
  void solve_wide(const Problem& problem) {
    problem_ = problem;
    const int64_t m = problem.targets, n = problem.slots, k = problem.repeat;
    cost_ = problem.cost, stride_ = problem.stride, width_ = n;
    columns_.clear();
    owner_.assign(n, -1), price_.assign(n, 0.0), count_.assign(m, 0);
    place_.resize(n), distance_.resize(n), chunks_.resize(n / kChunk + 1);
    owned_.resize(m * k), entry_.resize(m), level_.resize(m), offset_.resize(m), reached_.resize(m);
    minima_.resize(n), sorted_.resize(n), candidates_.resize(n);
    k == 1 ? start_with_one() : start_with_many();
    // Choosing columns costs about as much as some searches; mostly these are all that is left to do.
    int64_t patience = 4 * m;
    for (int32_t t = 0; t < m; ++t) {
      while (count_[t] < k) {
        patience -= add_slot(t);
        if (patience < 0 && 8 * m * k <= n) {
          patience = std::numeric_limits<int64_t>::max();
          drop_columns();
        }
      }
    }
    take_back_columns();
  }

  const float* row(int64_t target) const { return cost_ + target * stride_; }

  void own(int32_t target, int32_t column) {
    owner_[column] = target;
    place_[column] = count_[target];
    owned_[target * problem_.repeat + count_[target]++] = column;
  }

  // Give every target its cheapest slot, unless an earlier one has it.
  void start_with_one() {
    for (int32_t t = 0; t < problem_.targets; ++t) {
      const int64_t best = least_column(row(t), width_);
      check(best < width_);
      level_[t] = row(t)[best];
      if (owner_[best] < 0) {
        own(t, static_cast<int32_t>(best));
      }
    }
  }

  // Set the level of every target to its k-th cheapest cost: its k cheapest slots are what it wants. Those that several
  // want go to the one that gains most, which is then their price.
  void start_with_many() {
    const int64_t k = problem_.repeat;
    even_.clear();
    for (int32_t t = 0; t < problem_.targets; ++t) {
      const float* const cost = row(t);
      const int64_t count = find_candidates(cost, k);
      for (int64_t i = 0; i < count; ++i) {
        sorted_[i] = cost[candidates_[i]];
      }
      std::nth_element(sorted_.begin(), sorted_.begin() + (k - 1), sorted_.begin() + count);
      level_[t] = sorted_[k - 1];
      for (int64_t i = 0; i < count; ++i) {
        const int32_t s = candidates_[i];
        const double price = static_cast<double>(cost[s]) - level_[t];
        if (price < price_[s]) {
          price_[s] = price;
          owner_[s] = t;
        } else if (price == 0) {
          even_.emplace_back(t, s);
        }
      }
    }
    list_owned();
    for (const auto& [t, s] : even_) {
      if (count_[t] < k && owner_[s] < 0) {
        own(t, s);
      }
    }
  }

  // Put into candidates_ all columns of a row that cost at most some bound: the `least` cheapest and few more, or all.
  // Return how many.
  int64_t find_candidates(const float* cost, int64_t least) {
    const int64_t blocks = block_minima(cost, width_, minima_.data());
    const int64_t deep = width_ / (kLanes * kDepth) * kLanes;  // blocks of more than one number
    float bound = std::numeric_limits<float>::max();
    if (least <= blocks) {  // so many blocks have a number of at most the bound
      int64_t left = blocks;
      if (blocks > 8 * least) {  // larger blocks: a looser bound, less to sort
        left = block_minima(minima_.data(), blocks, sorted_.data());
      } else {
        std::copy(minima_.begin(), minima_.begin() + blocks, sorted_.begin());
      }
      std::nth_element(sorted_.begin(), sorted_.begin() + (least - 1), sorted_.begin() + left);
      bound = sorted_[least - 1];
    }
    int64_t count = 0;
    const auto look = [&](int64_t column) {
      candidates_[count] = static_cast<int32_t>(column);
      count += cost[column] <= bound;
    };
    for (int64_t b = 0; b < deep; ++b) {
      if (minima_[b] <= bound) {
        const int64_t begin = b / kLanes * kLanes * kDepth + b % kLanes;
        for (int64_t d = 0; d < kDepth; ++d) {
          look(begin + d * kLanes);
        }
      }
    }
    for (int64_t j = deep * kDepth; j < width_; ++j) {
      look(j);
    }
    check(count >= std::min(least, width_));
    return count;
  }

  // Give `target` one more slot by the cheapest chain of exchanges (Dijkstra's algorithm over targets). Return how many
  // rows were looked at.
  int64_t add_slot(int32_t target) {
    closed_.clear(), scanned_.clear();
    double least = 0;
    int32_t next = target, sink;
    while (true) {
      scanned_.push_back(next);
      reached_[next] = least;
      offset_[next] = least - level_[next];
      // Its own slots are as near as itself: whoever comes through one has nothing new to look at.
      for (int64_t i = 0; i < count_[next]; ++i) {
        close(owned_[next * problem_.repeat + i], least);
      }
      least = (next == target ? relax_first : relax_more)(row(next), price_.data(), offset_[next], distance_.data(),
                                                          chunks_.data(), width_);
      check(least < kInfinity);
      sink = nearest(least);
      if (owner_[sink] < 0) {
        break;
      }
      next = owner_[sink];
      entry_[next] = sink;
    }
    for (const Closed& c : closed_) {
      price_[c.column] = c.price;
    }
    exchange(target, sink);
    for (const int32_t t : scanned_) {
      level_[t] += least - reached_[t];
    }
    for (const Closed& c : closed_) {
      price_[c.column] -= least - c.distance;
    }
    return static_cast<int64_t>(scanned_.size());
  }

  // Take a column out of the search: with this price no distance to it is less than infinity.
  void close(int32_t column, double distance) {
    closed_.push_back({column, price_[column], distance});
    price_[column] = -kInfinity;
    distance_[column] = kInfinity;
  }

  // Return a column at the distance `least`, one without owner if there is any.
  int32_t nearest(double least) const {
    int64_t found = -1;
    for (int64_t begin = 0; begin < width_; begin += kChunk) {
      if (chunks_[begin / kChunk] != least) {
        continue;
      }
      for (int64_t j = begin, end = std::min(begin + kChunk, width_); j < end; ++j) {
        if (distance_[j] == least && (found < 0 || owner_[j] < 0)) {
          found = j;
          if (owner_[j] < 0) {
            return static_cast<int32_t>(j);
          }
        }
      }
    }
    return static_cast<int32_t>(found);
  }

  // Walk back from `column` to `target`: each target on the way gives away the slot it was reached through and gets the
  // one that was reached through it.
  void exchange(int32_t target, int32_t column) {
    double distance = distance_[column];
    while (true) {
      // Who gave the column its distance is not written down in the search. It is the first with that very number.
      const auto from = std::find_if(scanned_.begin(), scanned_.end(), [&](int32_t t) {
        return (static_cast<double>(row(t)[column]) - price_[column]) + offset_[t] == distance;
      });
      check(from != scanned_.end());
      if (*from == target) {
        own(target, column);
        return;
      }
      const int32_t given = entry_[*from];
      owner_[column] = *from;
      place_[column] = place_[given];
      owned_[*from * problem_.repeat + place_[column]] = column;
      column = given;
      distance = reached_[*from];
    }
  }

  // Look no more at slots that have no owner and are not among the m k cheapest of any target. That changes nothing:
  // fewer than m k slots are taken at any time, so every target has a free slot in what remains that costs no more.
  void drop_columns() {
    const int64_t slots = problem_.slots;
    wanted_.resize(slots);
    for (int64_t s = 0; s < slots; ++s) {
      wanted_[s] = owner_[s] >= 0;
    }
    for (int64_t t = 0; t < problem_.targets; ++t) {
      const int64_t count = find_candidates(row(t), problem_.targets * problem_.repeat);
      for (int64_t i = 0; i < count; ++i) {
        wanted_[candidates_[i]] = 1;
      }
    }
    for (int64_t s = 0; s < slots; ++s) {
      if (wanted_[s]) {
        columns_.push_back(static_cast<int32_t>(s));
      }
    }
    width_ = static_cast<int64_t>(columns_.size());
    kept_.resize(problem_.targets * width_);
    for (int64_t t = 0; t < problem_.targets; ++t) {
      for (int64_t j = 0; j < width_; ++j) {
        kept_[t * width_ + j] = row(t)[columns_[j]];
      }
    }
    cost_ = kept_.data(), stride_ = width_;
    for (int64_t j = 0; j < width_; ++j) {  // columns_[j] >= j: in place
      owner_[j] = owner_[columns_[j]];
      price_[j] = price_[columns_[j]];
    }
    list_owned();
  }

  // Make owner_ count in all slots again.
  void take_back_columns() {
    if (columns_.empty()) {
      return;
    }
    const std::vector<int32_t> owner(owner_.begin(), owner_.begin() + width_);
    std::fill(owner_.begin(), owner_.end(), -1);
    for (int64_t j = 0; j < width_; ++j) {
      owner_[columns_[j]] = owner[j];
    }
  }

  void list_owned() {
    std::fill(count_.begin(), count_.end(), 0);
    for (int64_t j = 0; j < width_; ++j) {
      if (owner_[j] >= 0) {
        own(owner_[j], static_cast<int32_t>(j));
      }
    }
  }

  static void check(bool found) {  // what cannot be found among finite numbers only
    if (!found) {
      throw std::domain_error("costs must be finite");
    }
  }

  Problem problem_{};
  const float* cost_ = nullptr;  // of the columns looked at
  int64_t stride_ = 0, width_ = 0;
  std::vector<int32_t> columns_;  // their slots; empty: all slots in order
  // By column.
  std::vector<int32_t> owner_;  // target, -1: none
  std::vector<int32_t> place_;  // index in the list of its owner
  std::vector<double> price_, distance_;
  std::vector<double> chunks_;  // least distance of every chunk
  // By target.
  std::vector<int32_t> owned_, count_;  // lists of columns, `repeat` entries for each, and their lengths
  std::vector<double> level_;  // price of a slot for it
  std::vector<double> reached_, offset_;  // in the present search: its distance; that less its level
  std::vector<int32_t> entry_;  // column it was reached through
  // Of the present search.
  std::vector<int32_t> scanned_;
  std::vector<Closed> closed_;
  // For choosing columns.
  std::vector<float> minima_, sorted_, kept_, turned_;
  std::vector<int32_t> candidates_;
  std::vector<std::pair<int32_t, int32_t>> even_;
  std::vector<uint8_t> wanted_;
};

}  // namespace assigndetr
