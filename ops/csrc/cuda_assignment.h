// The cheapest assignment of slots to targets that may take several each, on the GPU: one block of threads per problem,
// all problems in at most two launches, and the host never asks for a number. No PyTorch here, so that tests can
// compile and run the kernel alone.
//
// Shortest augmenting paths with prices, as in assignment.h, with the columns shared out over the threads of a block: a
// thread keeps to its own columns, and only the nearest column of a search is found together. Equal distances are
// decided as there: a column without owner first, then the lowest number. So the pairs are always the same. Columns
// that no optimum needs are left out before (cuda_columns.h), and where few remain one warp searches on: it needs no
// barrier.
//
// The includer defines ASSIGNDETR_LAUNCH_BLOCKS(kernel, blocks, threads, bytes, stream), which launches with `bytes` of
// shared memory, and ASSIGNDETR_SHARED(name), which declares that memory.
#pragma once

#include <climits>
#include <type_traits>
#include <vector>

#include "cuda_columns.h"
#include "problem.h"

namespace assigndetr {

constexpr int kOwned = 1 << 30;  // added to the number of a column that has an owner: nearer ones of equals have none
constexpr int kSmallWarps = 4, kLargeWarps = 16;
constexpr int64_t kSmallColumns = 1024;  // with more of them a problem gets kLargeWarps
constexpr int64_t kSmallBytes = 48 << 10;  // every block may have so much shared memory without asking
constexpr int kColumnsOfWarp = 64;  // with more of them all warps of a block search
constexpr int64_t kNoScratch = -1;

// A problem on its way to the device; all are int64 there.
struct Task {
  int64_t offset, targets, slots, stride, repeat;
  int64_t number;   // of the problem in the table of the caller
  int64_t start;    // of its pairs
  int64_t scratch;  // byte where its memory begins in the scratch, or kNoScratch: in shared memory
};
constexpr int64_t kTaskFields = sizeof(Task) / sizeof(int64_t);

// A column and how far it is. Order: distance, then number.
struct Near {
  double distance;
  int key;
};

ASSIGNDETR_HD bool nearer(const Near& a, const Near& b) {
  return a.distance < b.distance || (a.distance == b.distance && a.key < b.key);
}

// The nearest of `lanes` neighbouring lanes, in all of them.
template <int lanes>
__device__ __forceinline__ Near nearest_of_lanes(Near own) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) {
    const Near other{__shfl_xor_sync(0xffffffffu, own.distance, step), __shfl_xor_sync(0xffffffffu, own.key, step)};
    own = nearer(other, own) ? other : own;
  }
  return own;
}

// Solves one problem; the threads of kWarps warps run it together, a single one without the others of its block.
template <int kWarps>
struct TeamSolver {
  static constexpr int kTeam = kWarps * kWarp;

  const Job& job;
  const Form form;
  const State s;
  Near (*const meeting)[kWarps];  // two rows in shared memory: a thread may be one search step ahead of another
  int steps;

  __device__ TeamSolver(const Job& job, Near (*meeting)[kWarps])
      : job(job), form(job.form), s(state_in(job.memory, job.form)), meeting(meeting), steps(0) {}

  // What the threads wrote before is seen by all of them afterwards.
  __device__ __forceinline__ void meet() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // After choose_first(), of this team or a larger one.
  __device__ void search() {
    for (int row = 0; row < form.rows; ++row) {
      for (int left = form.repeat - s.count[row]; left > 0; --left) {
        add_column(row);
      }
    }
  }

  // Set the level of every row to its repeat-th cheapest cost. What a row has cheaper goes to the row that gains most,
  // which is then the price; the repeat-th to the first row that wants it.
  __device__ void choose_first() {
    const int thread = threadIdx.x, lane = thread % kWarp;
    for (int row = thread / kWarp; row < form.rows; row += kWarps) {
      const float* const costs = job.row_of(row);
      Near last{-HUGE_VAL, -1};
      for (int rank = 0; rank < form.repeat; ++rank) {
        Near next{HUGE_VAL, INT_MAX};
        for (int j = lane; j < form.columns; j += kWarp) {
          const Near here{job.read(costs, j), j};
          next = nearer(last, here) && nearer(here, next) ? here : next;
        }
        last = nearest_of_lanes<kWarp>(next);
      }
      if (lane == 0) {
        s.level[row] = last.distance, s.entry[row] = last.key, s.reached[row] = HUGE_VAL, s.count[row] = 0;
      }
    }
    meet();
    const int wishes = form.repeat > 1 ? form.rows : 0;  // nothing is cheaper than the cheapest
    for (int j = thread; j < form.columns; j += kTeam) {
      double price = 0;
      int owner = -1;
#pragma unroll 1
      for (int row = 0; row < wishes; ++row) {
        const double gain = job.read(job.row_of(row), j) - s.level[row];
        owner = gain < price ? row : owner;
        price = gain < price ? gain : price;
      }
      s.price[j] = price, s.owner[j] = owner;
      if (owner >= 0) {
        atomicAdd(s.count + owner, 1);
      }
    }
    meet();
    for (int row = 0; thread == 0 && row < form.rows; ++row) {
      const int column = s.entry[row];
      if (s.count[row] < form.repeat && s.owner[column] < 0) {
        s.owner[column] = row, ++s.count[row];
      }
    }
    meet();
  }

  // Give `target` one more column by the cheapest chain of exchanges.
  __device__ void add_column(int target) {
    const int thread = threadIdx.x;
    if (thread == 0) {
      s.reached[target] = 0;
    }
    double least = 0;
    int row = target, sink;
    while (true) {
      const Near found = team_nearest(row == target ? look<true>(row, least) : look<false>(row, least));
      least = found.distance, sink = found.key & ~kOwned;
      if (!(found.key & kOwned)) {
        break;
      }
      row = s.owner[sink];
      if (thread == 0) {
        s.entry[row] = sink, s.reached[row] = least;
      }
    }
    for (int j = thread; j < form.columns; j += kTeam) {
      if (s.distance[j] == -HUGE_VAL) {
        s.price[j] -= least - s.reached[s.owner[j]];
      }
    }
    meet();  // from here on owners change
    if (thread == 0) {
      exchange(target, sink);
    }
    for (int r = thread; r < form.rows; r += kTeam) {
      if (s.reached[r] < HUGE_VAL) {
        s.level[r] += least - s.reached[r];
        s.reached[r] = HUGE_VAL;
      }
    }
    meet();
  }

  // Write down what is nearer by way of `row`, which the search has reached at `least`; return the nearest column that
  // it has not passed, of this thread's. Columns of the row itself are as near as the row: passed.
  template <bool first>
  __device__ __forceinline__ Near look(int row, double least) {
    const float* const costs = job.row_of(row);
    const double offset = least - s.level[row];
    Near nearest{HUGE_VAL, INT_MAX};
    for (int j = threadIdx.x; j < form.columns; j += kTeam) {
      const int owner = s.owner[j];
      double distance = first ? HUGE_VAL : s.distance[j];
      if (owner == row) {
        s.distance[j] = -HUGE_VAL;
        continue;
      }
      if (distance == -HUGE_VAL) {
        continue;
      }
      const double here = (job.read(costs, j) - s.price[j]) + offset;
      if (here < distance) {
        s.distance[j] = distance = here, s.from[j] = row;
      }
      const Near candidate{distance, owner < 0 ? j : j | kOwned};
      nearest = nearer(candidate, nearest) ? candidate : nearest;
    }
    return nearest;
  }

  // The nearest of all threads, in all of them. Whatever they wrote before is seen afterwards.
  __device__ __forceinline__ Near team_nearest(Near own) {
    own = nearest_of_lanes<kWarp>(own);
    if constexpr (kWarps == 1) {
      meet();
      return own;
    }
    Near* const places = meeting[steps++ % 2];
    if (threadIdx.x % kWarp == 0) {
      places[threadIdx.x / kWarp] = own;
    }
    meet();
    return nearest_of_lanes<kWarps>(places[threadIdx.x % kWarps]);
  }

  // Walk back from `column` to `target`: each row on the way gives away the column it was reached through and gets the
  // one that was reached through it.
  __device__ void exchange(int target, int column) {
    ++s.count[target];
    while (true) {
      const int row = s.from[column];
      s.owner[column] = row;
      if (row == target) {
        return;
      }
      column = s.entry[row];
    }
  }

  // Write slots (ascending) and targets.
  __device__ void write(int64_t* slots, int64_t* picked) const {
    if (form.turned) {
      for (int j = threadIdx.x; j < form.columns; j += kTeam) {
        if (const int slot = s.owner[j]; slot >= 0) {
          slots[slot] = slot, picked[slot] = job.named(j) % job.targets;
        }
      }
      return;
    }
    const unsigned lane = threadIdx.x;
    if (lane >= kWarp) {
      return;
    }
    int before = 0;
    for (int first = 0; first < form.columns; first += kWarp) {
      const int j = first + static_cast<int>(lane), owner = j < form.columns ? s.owner[j] : -1;
      const unsigned taken = __ballot_sync(0xffffffffu, owner >= 0);
      if (owner >= 0) {
        const int at = before + __popc(taken & ((1u << lane) - 1));
        slots[at] = job.named(j), picked[at] = owner;
      }
      before += __popc(taken);
    }
  }
};

// Solve tasks[blockIdx.x]. `pairs` (3, total): problem, slot and target of every pair.
template <int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp, kWarps == kSmallWarps ? 4 : 1)
    solve_assignment(const float* __restrict__ costs, const Task* __restrict__ tasks, float unmatchable,
                     char* scratch, int64_t total, int64_t* __restrict__ pairs) {
  __shared__ Near meeting[2][kWarps];
  ASSIGNDETR_SHARED(shared);
  const Task task = tasks[blockIdx.x];
  char* memory = shared;
  if constexpr (kWarps == kLargeWarps) {
    memory = task.scratch == kNoScratch ? shared : scratch + task.scratch;
  }
  const Form form = form_of(task.targets, task.slots, task.repeat);
  Job job{costs + task.offset, task.stride, static_cast<int>(task.targets), unmatchable, form, form.turned,
          memory,              nullptr};
  ColumnDropper<kWarps>{job}.drop();
  TeamSolver<kWarps> solver(job, meeting);
  solver.choose_first();
  int64_t *const own = pairs + task.start, *const slots = own + total, *const picked = slots + total;
  if (job.form.columns > kColumnsOfWarp) {
    solver.search();
    solver.write(slots, picked);
  } else if (threadIdx.x < kWarp) {
    TeamSolver<1> alone(job, nullptr);
    alone.search();
    alone.write(slots, picked);
  }
  const int64_t count = form.turned ? form.rows : int64_t(form.rows) * form.repeat;
  for (int64_t i = threadIdx.x; i < count; i += kWarps * kWarp) {
    own[i] = task.number;
  }
}

// How a call is launched: small problems with few threads each, the others with many.
struct AssignmentPlan {
  std::vector<Task> tasks;  // small ones first; none for problems without pairs
  int64_t small = 0;        // how many are small
  int64_t pairs = 0;
  int64_t small_bytes = 0, large_bytes = 0;  // of shared memory of a block
  int64_t scratch_bytes = 0;
};

// Make the plan for problems whose `cost` counts from `costs`. A block may have `shared_bytes` of shared memory.
inline AssignmentPlan plan_assignment(const std::vector<Problem>& problems, const float* costs, int64_t shared_bytes) {
  AssignmentPlan plan;
  std::vector<Task> large;
  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem& p = problems[i];
    if (p.pairs() == 0) {
      continue;
    }
    const Form form = form_of(p.targets, p.slots, p.repeat);
    const int64_t bytes = memory_bytes(form);
    Task task{p.cost - costs, p.targets, p.slots, p.stride, p.repeat, static_cast<int64_t>(i), plan.pairs, kNoScratch};
    plan.pairs += p.pairs();
    if (form.columns <= kSmallColumns && bytes <= kSmallBytes - 1024) {  // less what the kernel has for itself
      plan.small_bytes = std::max(plan.small_bytes, bytes);
      plan.tasks.push_back(task);
      continue;
    }
    if (bytes <= shared_bytes - 2048) {
      plan.large_bytes = std::max(plan.large_bytes, bytes);
    } else {
      task.scratch = plan.scratch_bytes;
      plan.scratch_bytes += bytes;
    }
    large.push_back(task);
  }
  plan.small = static_cast<int64_t>(plan.tasks.size());
  plan.tasks.insert(plan.tasks.end(), large.begin(), large.end());
  return plan;
}

// Launch a plan whose tasks lie at `tasks` on the device.
template <typename Stream>
void launch_assignment(const AssignmentPlan& plan, const float* costs, const Task* tasks, float unmatchable,
                       char* scratch, int64_t* pairs, Stream stream) {
  if (plan.small > 0) {
    ASSIGNDETR_LAUNCH_BLOCKS(solve_assignment<kSmallWarps>, plan.small, kSmallWarps* kWarp, plan.small_bytes, stream)
    (costs, tasks, unmatchable, scratch, plan.pairs, pairs);
  }
  const int64_t large = static_cast<int64_t>(plan.tasks.size()) - plan.small;
  if (large > 0) {
    ASSIGNDETR_LAUNCH_BLOCKS(solve_assignment<kLargeWarps>, large, kLargeWarps* kWarp, plan.large_bytes, stream)
    (costs, tasks + plan.small, unmatchable, scratch, plan.pairs, pairs);
  }
}

}  // namespace assigndetr
