// What a problem of cuda_assignment.h looks like to the threads that solve it, and how they leave out the columns that
// no cheapest assignment needs. No PyTorch here.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cuda_layout.h"

namespace assigndetr {

// What is solved: rows that take `repeat` columns each. Rows are the targets. Where there are not enough slots for all,
// rows are the slots, and columns the copies of targets.
struct Form {
  bool turned;
  int rows, columns, repeat;
};

ASSIGNDETR_HD Form form_of(int64_t targets, int64_t slots, int64_t repeat) {
  const int64_t copies = targets * repeat;
  if (copies > slots) {
    return {true, static_cast<int>(slots), static_cast<int>(copies), 1};
  }
  return {false, static_cast<int>(targets), static_cast<int>(slots), static_cast<int>(repeat)};
}

// Memory of the search, kStateBytes for each row and column.
struct State {
  double *price, *distance;  // by column; a distance of -infinity: the search has passed it
  double *level, *reached;   // by row: price of a column for it; its distance in the present search, infinity: none
  int *owner, *from;         // by column: row that has it, -1: none; row that gave it its distance
  int *entry, *count;        // by row: column it was reached through; columns it has
};
constexpr int kStateBytes = 24;

ASSIGNDETR_HD State state_in(char* memory, const Form& form) {
  State s;
  s.price = reinterpret_cast<double*>(memory), s.distance = s.price + form.columns;
  s.level = s.distance + form.columns, s.reached = s.level + form.rows;
  s.owner = reinterpret_cast<int*>(s.reached + form.rows), s.from = s.owner + form.columns;
  s.entry = s.from + form.columns, s.count = s.entry + form.rows;
  return s;
}

// What a problem needs: its state and, behind it, the list of the columns that are left.
ASSIGNDETR_HD int64_t memory_bytes(const Form& form) {
  const int64_t list = sizeof(int) * (int64_t(form.columns) + 1);  // how many there are comes first
  return kStateBytes * (int64_t(form.rows) + form.columns) + (list + 7) / 8 * 8;
}

// Numbers in the order of the costs, for costs that are numbers.
ASSIGNDETR_HD unsigned order_of(float cost) {
  unsigned bits;
  std::memcpy(&bits, &cost, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

// Whether leaving out columns may pay off: only if so few are left that their costs can be copied into the memory that
// becomes free. At least rows * repeat are left, mostly some times as many.
ASSIGNDETR_HD bool worth_dropping(const Form& form) {
  return 4 * int64_t(form.rows) * form.repeat * (form.rows + 6) <= 6 * int64_t(form.columns);
}

// A problem in the hands of a block of threads.
struct Job {
  const float* cost;
  int64_t stride;
  int targets;
  float unmatchable;  // stands for a cost that is not finite
  Form form;
  bool across;        // costs of a row lie one stride apart, those of the columns one after the other
  char* memory;
  const int* left;    // slots or copies of the columns, null: all

  ASSIGNDETR_HD const float* row_of(int row) const { return across ? cost + row : cost + row * stride; }
  ASSIGNDETR_HD float read(const float* row, int column) const {
    const float c = row[across ? column % targets * stride : int64_t(column)];
    return fabsf(c) <= FLT_MAX ? c : unmatchable;
  }
  ASSIGNDETR_HD int named(int column) const { return left == nullptr ? column : left[column]; }
};

__device__ __forceinline__ int sum_of_warp(int number) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    number += __shfl_xor_sync(0xffffffffu, number, step);
  }
  return number;
}

// Leaves out the columns that are not among the rows * repeat cheapest of any row. Fewer than that are taken while a
// row looks for another one, so one that costs it no more is always free among those. All threads of the block come
// here.
template <int kWarps>
struct ColumnDropper {
  static constexpr int kBlock = kWarps * kWarp;

  Job& job;

  __device__ void drop() {
    Form& form = job.form;
    if (!worth_dropping(form)) {
      return;
    }
    int* const wanted = reinterpret_cast<int*>(job.memory);
    int* const list = reinterpret_cast<int*>(job.memory + kStateBytes * (int64_t(form.rows) + form.columns));
    for (int j = threadIdx.x; j < form.columns; j += kBlock) {
      wanted[j] = 0;
    }
    __syncthreads();
    for (int row = threadIdx.x / kWarp; row < form.rows; row += kWarps) {
      mark(job.row_of(row), wanted);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      write_list(wanted, list);
    }
    __syncthreads();
    const int width = *list;
    if (int64_t(form.rows) * width * sizeof(float) > kStateBytes * int64_t(form.columns - width)) {
      return;
    }
    float* const kept = reinterpret_cast<float*>(job.memory + kStateBytes * (int64_t(form.rows) + width));
    for (int i = threadIdx.x; i < form.rows * width; i += kBlock) {
      kept[i] = job.read(job.row_of(i / width), list[1 + i % width]);
    }
    job.cost = kept, job.stride = width, job.across = false, job.left = list + 1;
    form.columns = width;
    __syncthreads();
  }

  // Mark the rows * repeat cheapest columns of a row and few more; a warp does it together.
  __device__ void mark(const float* costs, int* wanted) const {
    const int lane = threadIdx.x % kWarp, columns = job.form.columns, least = job.form.rows * job.form.repeat;
    const int enough = least + least / 4;
    unsigned below = 0, bound = ~0u;  // up to the first there are fewer than `least`, up to the second are not
    while (bound - below > 1) {
      const unsigned middle = below + (bound - below) / 2;
      int count = 0;
      for (int j = lane; j < columns; j += kWarp) {
        count += order_of(job.read(costs, j)) <= middle;
      }
      count = sum_of_warp(count);
      (count < least ? below : bound) = middle;
      if (count >= least && count <= enough) {
        break;
      }
    }
    for (int j = lane; j < columns; j += kWarp) {
      if (order_of(job.read(costs, j)) <= bound) {
        wanted[j] = 1;
      }
    }
  }

  // Write how many columns are wanted, and which, in ascending order; one warp does it.
  __device__ void write_list(const int* wanted, int* list) const {
    const int lane = threadIdx.x;
    int before = 0;
    for (int first = 0; first < job.form.columns; first += kWarp) {
      const int j = first + lane;
      const bool here = j < job.form.columns && wanted[j];
      const unsigned all = __ballot_sync(0xffffffffu, here);
      if (here) {
        list[1 + before + __popc(all & ((1u << lane) - 1))] = j;
      }
      before += __popc(all);
    }
    if (lane == 0) {
      *list = before;
    }
  }
};

}  // namespace assigndetr
