// How the CUDA kernels come to locations and weights of samples, and where their gradients go: read and written as they
// are (StoredSource), or computed from and turned into reference points, offsets and logits (FusedSource).
//
// A source is an argument of a kernel. FastReader and FastWriter serve the lanes that share an item in cuda_fast.h,
// GenericReader and GenericWriter one thread of cuda_generic.h, which are told where levels begin and end. In the fast
// kernels registers are scarce: what is quickly read or computed again is not kept while the cells are read.
#pragma once

#include <type_traits>

#include "cuda_sums.h"
#include "projected.h"

namespace assigndetr {

constexpr unsigned kAllLanes = 0xffffffffu;

// Samples whose places are computed at a time: one by each lane of an item, which then hands it to the others.
template <int lanes>
constexpr int kChunk = lanes < 4 ? lanes : 4;

// Vectors of 16 bytes begin where they can be read at once.
inline bool aligned(const void* address, int bytes = 16) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

template <typename T>
struct StoredSource {
  using Sum = T;
  const T* locations;
  const T* weights;

  struct Gradient {
    T* locations;
    T* weights;
    bool is_aligned() const { return aligned(locations, 2 * sizeof(T)); }
  };
  bool is_aligned() const { return aligned(locations, 2 * sizeof(T)); }
};

// Offsets and logits have the type of the values, reference points that of the sums.
template <typename scalar_t, typename T>
struct FusedSource {
  using Number = scalar_t;
  using Sum = T;
  const scalar_t* offsets;
  const scalar_t* logits;
  const T* reference;
  int numbers;  // of a reference point: 2 or 4
  T share;      // see anchor_at()

  // Those of the logits are written twice, so they are in the type of the sums; those of the reference points are
  // written per head, as (image, query, head, level, numbers), and null if nobody wants them.
  struct Gradient {
    scalar_t* offsets;
    T* logits;
    T* reference;
    bool is_aligned() const { return aligned(offsets, 2 * sizeof(scalar_t)); }
  };
  bool is_aligned() const { return aligned(offsets, 2 * sizeof(scalar_t)); }
};

// What the lanes of an item have together. Neighbours at all distances below `lanes`, a power of two, are added.
template <int lanes, typename T>
__device__ __forceinline__ T sum_of_lanes(T number) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    number += __shfl_xor_sync(kAllLanes, number, distance);
  }
  return number;
}

template <int lanes>
__device__ __forceinline__ float largest_of_lanes(float number) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, number, distance);
    number = other > number ? other : number;
  }
  return number;
}

template <typename Source, int lanes>
struct FastReader;
template <typename Source, int lanes>
struct FastWriter;
template <typename Source>
struct GenericReader;
template <typename Source>
struct GenericWriter;

template <int lanes>
struct FastReader<StoredSource<float>, lanes> {
  const StoredSource<float>& source;
  const int64_t first;  // sample of the item

  struct Origin {};  // nothing is needed per level

  __device__ __forceinline__ FastReader(const Plan& plan, const StoredSource<float>& source, const Item& item, int)
      : source(source), first(item.index * plan.levels * plan.points) {}

  template <bool again = false>
  __device__ __forceinline__ Origin origin(const Plan&, int) const {
    return {};
  }

  // The sample of this lane: point `point` of level `l`. A point that does not exist weighs nothing. Told that the
  // tensors are only read, the compiler needs fewer registers.
  __device__ __forceinline__ Spot spot(const Plan& plan, int l, int point, Origin) const {
    const int64_t sample = first + l * plan.points + (point < plan.points ? point : plan.points - 1);
    const float2 at = __ldg(reinterpret_cast<const float2*>(source.locations + 2 * sample));
    return spot_at(at.x, at.y, point < plan.points ? __ldg(source.weights + sample) : 0.0f, plan.level[l]);
  }
};

template <int lanes>
struct FastWriter<StoredSource<float>, lanes> {
  using Reader = FastReader<StoredSource<float>, lanes>;
  const StoredSource<float>::Gradient& to;

  __device__ __forceinline__ explicit FastWriter(const StoredSource<float>::Gradient& to) : to(to) {}

  // All lanes come here: kChunk of them have samples of their own, the others the same again.
  __device__ __forceinline__ void put(const Plan& plan, const Reader& reader, const Item& item, const Spot& spot,
                                      const float (&dots)[4], int l, int point, int lane) {
    if (item.active && lane < kChunk<lanes> && point < plan.points) {
      const SampleGradient by = sample_gradient(spot, dots, plan.level[l]);
      const int64_t sample = reader.first + l * plan.points + point;
      to.weights[sample] = by.weight;
      *reinterpret_cast<Vec<float, 2>*>(to.locations + 2 * sample) = {by.x, by.y};
    }
  }
  __device__ __forceinline__ void end_item(const Plan&, const Reader&, const Item&, int) {}
};

template <typename scalar_t, int lanes>
struct FastReader<FusedSource<scalar_t, float>, lanes> {
  using Source = FusedSource<scalar_t, float>;
  const Source& source;
  const int64_t first;        // sample of the item
  const float* const points;  // the reference points of the query, level by level
  const int query;
  Softmax<float> softmax;

  __device__ __forceinline__ FastReader(const Plan& plan, const Source& source, const Item& item, int lane)
      : source(source),
        first(item.index * plan.levels * plan.points),
        points(points_of(plan, source, item.query)),
        query(item.query) {
    const scalar_t* const logits = source.logits + first;
    const int samples = plan.levels * plan.points;
    float top = kLowest<float>, sum = 0.0f;
#pragma unroll 1
    for (int s = lane; s < samples; s += lanes) {
      const float logit = static_cast<float>(logits[s]);
      top = logit > top ? logit : top;
    }
    top = largest_of_lanes<lanes>(top);
#pragma unroll 1
    for (int s = lane; s < samples; s += lanes) {
      sum += std::exp(static_cast<float>(logits[s]) - top);
    }
    softmax = {top, 1.0f / sum_of_lanes<lanes>(sum)};
  }

  static __device__ __forceinline__ const float* points_of(const Plan& plan, const Source& source, int query) {
    const int64_t row = int64_t(blockIdx.y) * plan.queries + query;  // a row of blocks takes an image
    return source.reference + row * plan.levels * source.numbers;
  }

  // Where the samples of a level begin; `again`: from the number of the query, which takes a register less to keep.
  template <bool again = false>
  __device__ __forceinline__ Anchor<float> origin(const Plan& plan, int l) const {
    const float* const from = again ? points_of(plan, source, query) : points;
    return anchor_at(from + l * source.numbers, source.numbers, plan.level[l].cell_x, plan.level[l].cell_y,
                     source.share);
  }

  __device__ __forceinline__ Spot spot(const Plan& plan, int l, int point, const Anchor<float>& from) const {
    const int64_t sample = first + l * plan.points + (point < plan.points ? point : plan.points - 1);
    const Vec<scalar_t, 2> offset = load<scalar_t, 2>(source.offsets + 2 * sample);
    return spot_at(from.x + static_cast<float>(offset.at[0]) * from.scale_x,
                   from.y + static_cast<float>(offset.at[1]) * from.scale_y,
                   point < plan.points ? softmax.weight(source.logits[sample]) : 0.0f, plan.level[l]);
  }
};

template <typename scalar_t, int lanes>
struct FastWriter<FusedSource<scalar_t, float>, lanes> {
  using Source = FusedSource<scalar_t, float>;
  using Reader = FastReader<Source, lanes>;
  static constexpr int chunk = kChunk<lanes>;
  const typename Source::Gradient& to;
  float mean = 0.0f;  // of the gradients of the weights, over the softmax; of this lane's samples

  __device__ __forceinline__ explicit FastWriter(const typename Source::Gradient& to) : to(to) {}

  __device__ __forceinline__ void put(const Plan& plan, const Reader& reader, const Item& item, const Spot& spot,
                                      const float (&dots)[4], int l, int point, int lane) {
    const bool exists = point < plan.points, writes = item.active && lane < chunk && exists;
    const SampleGradient by = sample_gradient(spot, dots, plan.level[l]);
    const int64_t sample = reader.first + l * plan.points + (exists ? point : plan.points - 1);
    const Vec<scalar_t, 2> offset = load<scalar_t, 2>(reader.source.offsets + 2 * sample);
    const Anchor<float> from = reader.template origin<true>(plan, l);
    mean += exists ? spot.attention * by.weight : 0.0f;
    if (writes) {
      to.logits[sample] = by.weight;  // end_item() makes it a gradient of the logit
      *reinterpret_cast<Vec<scalar_t, 2>*>(to.offsets + 2 * sample) = {static_cast<scalar_t>(by.x * from.scale_x),
                                                                       static_cast<scalar_t>(by.y * from.scale_y)};
    }
    if (to.reference != nullptr) {
      const int numbers = reader.source.numbers;
      const float share = reader.source.share;
      const float terms[4] = {by.x, by.y, by.x * share * static_cast<float>(offset.at[0]),
                              by.y * share * static_cast<float>(offset.at[1])};
      float* const sums = to.reference + (item.index * plan.levels + l) * numbers;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = sum_of_lanes<chunk>(exists ? terms[i] : 0.0f);
        if (item.active && lane == 0 && i < numbers) {
          sums[i] = point == 0 ? sum : sums[i] + sum;
        }
      }
    }
  }

  __device__ __forceinline__ void end_item(const Plan& plan, const Reader& reader, const Item& item, int lane) {
    mean = sum_of_lanes<chunk>(mean);
    if (!item.active || lane >= chunk) {
      return;
    }
#pragma unroll 1
    for (int l = 0; l < plan.levels; ++l) {
#pragma unroll 1
      for (int point = lane; point < plan.points; point += chunk) {  // those that this lane has written
        const int64_t sample = reader.first + l * plan.points + point;
        const float weight = reader.softmax.weight(reader.source.logits[sample]);
        to.logits[sample] = weight * (to.logits[sample] - mean);
      }
    }
  }
};

template <typename T>
struct GenericReader<StoredSource<T>> {
  const StoredSource<T>& source;

  __device__ __forceinline__ GenericReader(const Levels&, const Sizes&, const StoredSource<T>& source, int64_t)
      : source(source) {}
  __device__ __forceinline__ void begin(const Levels&, int) {}
  __device__ __forceinline__ T weight(int64_t sample) const { return source.weights[sample]; }
  __device__ __forceinline__ bool find(int64_t sample, const Level& level, Corners<T>& at) const {
    return locate(source.locations[2 * sample], source.locations[2 * sample + 1], level, at);
  }
};

template <typename T>
struct GenericWriter<StoredSource<T>> {
  using Reader = GenericReader<StoredSource<T>>;
  const typename StoredSource<T>::Gradient& to;

  __device__ __forceinline__ explicit GenericWriter(const typename StoredSource<T>::Gradient& to) : to(to) {}
  __device__ __forceinline__ void put(const Reader&, int64_t sample, T, T by_weight, T by_x, T by_y) {
    to.weights[sample] = by_weight;
    to.locations[2 * sample] = by_x;
    to.locations[2 * sample + 1] = by_y;
  }
  __device__ __forceinline__ void end_level(const Reader&, const Levels&, int64_t, int) {}
  __device__ __forceinline__ void end_item(const Reader&, int64_t, int64_t) {}
};

template <typename scalar_t, typename T>
struct GenericReader<FusedSource<scalar_t, T>> {
  const FusedSource<scalar_t, T>& source;
  const T* const points;  // the reference points of the query, level by level
  const Softmax<T> softmax;
  Anchor<T> anchor;

  __device__ __forceinline__ GenericReader(const Levels& levels, const Sizes& n,
                                           const FusedSource<scalar_t, T>& source, int64_t item)
      : source(source),
        points(source.reference + item / n.heads * levels.count * source.numbers),
        softmax(softmax_of<T>(source.logits + item * levels.count * n.points, levels.count * n.points)) {}

  __device__ __forceinline__ void begin(const Levels& levels, int l) {
    anchor = anchor_at(points + l * source.numbers, source.numbers, T(1) / static_cast<T>(levels.level[l].width),
                       T(1) / static_cast<T>(levels.level[l].height), source.share);
  }
  __device__ __forceinline__ T weight(int64_t sample) const { return softmax.weight(source.logits[sample]); }
  __device__ __forceinline__ bool find(int64_t sample, const Level& level, Corners<T>& at) const {
    return locate(anchor.x + static_cast<T>(source.offsets[2 * sample]) * anchor.scale_x,
                  anchor.y + static_cast<T>(source.offsets[2 * sample + 1]) * anchor.scale_y, level, at);
  }
};

template <typename scalar_t, typename T>
struct GenericWriter<FusedSource<scalar_t, T>> {
  using Source = FusedSource<scalar_t, T>;
  using Reader = GenericReader<Source>;
  const typename Source::Gradient& to;
  T mean = 0, sums[4] = {};  // as in FastWriter

  __device__ __forceinline__ explicit GenericWriter(const typename Source::Gradient& to) : to(to) {}

  __device__ __forceinline__ void put(const Reader& reader, int64_t sample, T weight, T by_weight, T by_x, T by_y) {
    mean += weight * by_weight;
    sums[0] += by_x;
    sums[1] += by_y;
    sums[2] += by_x * static_cast<T>(reader.source.offsets[2 * sample]);
    sums[3] += by_y * static_cast<T>(reader.source.offsets[2 * sample + 1]);
    to.logits[sample] = by_weight;
    to.offsets[2 * sample] = static_cast<scalar_t>(by_x * reader.anchor.scale_x);
    to.offsets[2 * sample + 1] = static_cast<scalar_t>(by_y * reader.anchor.scale_y);
  }

  __device__ __forceinline__ void end_level(const Reader& reader, const Levels& levels, int64_t item, int l) {
    const int numbers = reader.source.numbers;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (to.reference != nullptr && i < numbers) {
        to.reference[(item * levels.count + l) * numbers + i] = i < 2 ? sums[i] : sums[i] * reader.source.share;
      }
      sums[i] = 0;
    }
  }

  __device__ __forceinline__ void end_item(const Reader& reader, int64_t first, int64_t samples) {
    for (int64_t sample = first; sample < first + samples; ++sample) {
      to.logits[sample] = reader.weight(sample) * (to.logits[sample] - mean);
    }
  }
};

}  // namespace assigndetr
