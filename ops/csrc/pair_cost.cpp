// The costs of all pairs of targets and slots of their images, shared out over threads. Called by ops/pair_cost.py.
#include "pair_cost.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "pair_cost_check.h"
#include "vector_code.h"

namespace assigndetr {
namespace {

constexpr int64_t kBlock = 16;           // slots that are computed together; rows are filled up to whole blocks
constexpr int64_t kCostsPerThread = 1 << 14;

// The slots of one layer and image, one plane of `width` numbers each.
struct Planes {
  const float *logit, *x, *y, *w, *h;
};

// All slots go through the same vector code: equal pairs cost the same to the bit.
ASSIGNDETR_VECTOR_CODE static void cost_row(const Planes& planes, const CentreBox& target, const CostWeights& weights,
                                            int64_t width, float* costs) {
  const float *const logit = planes.logit, *const x = planes.x, *const y = planes.y;
  const float *const w = planes.w, *const h = planes.h;
  const CentreBox own = target;
  const CostWeights by = weights;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    costs[i] = pair_cost<VectorMath>(logit[i], x[i], y[i], w[i], h[i], own, by);
  }
}

// Copy `count` numbers that lie `stride` apart; the last one once more until `width` are full.
template <typename scalar_t>
void gather(const scalar_t* from, int64_t stride, int64_t count, int64_t width, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<float>(from[i * stride]);
  }
  std::fill(to + count, to + width, to[count - 1]);
}

template <typename logit_t, typename box_t>
void compute(const logit_t* logits, const box_t* boxes, const int64_t* labels, const int64_t* image,
             const float* targets, const CostSizes& n, const CostWeights& weights, float* costs) {
  const int64_t rows = n.layers * n.targets, width = (n.slots + kBlock - 1) / kBlock * kBlock;
  const int64_t grain = std::max<int64_t>(1, kCostsPerThread / n.slots);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(6 * width);
    float *const plane = memory.data(), *const row = plane + 5 * width;
    const Planes planes{plane, plane + width, plane + 2 * width, plane + 3 * width, plane + 4 * width};
    int64_t held = -1;  // the layer and image whose boxes are in the planes
    for (int64_t i = begin; i < end; ++i) {
      const int64_t layer = i / n.targets, target = i % n.targets, place = layer * n.batch + image[target];
      if (place != held) {
        const box_t* const from = boxes + layer * n.box_layer + image[target] * n.box_image;
        for (int64_t k = 0; k < 4; ++k) {
          gather(from + k * n.box_number, n.box_slot, n.slots, width, plane + (k + 1) * width);
        }
        held = place;
      }
      gather(logits + layer * n.logit_layer + image[target] * n.logit_image + labels[target] * n.logit_class,
             n.logit_slot, n.slots, width, plane);
      const float* const own = targets + 4 * target;
      cost_row(planes, {own[0], own[1], own[2], own[3]}, weights, width, row);
      std::copy_n(row, n.slots, costs + (target * n.layers + layer) * n.slots);
    }
  });
}

// Return (targets, layers, slots) float32.
at::Tensor pair_costs_cpu(const at::Tensor& logits, const at::Tensor& boxes, const at::Tensor& labels,
                          const at::Tensor& targets, const at::Tensor& image, double class_weight, double l1_weight,
                          double giou_weight, double giou_eps) {
  TORCH_CHECK_VALUE(logits.is_cpu(), "logits must be on the CPU, found ", logits.device());
  const CostSizes n = read_cost_sizes(logits, boxes, labels, targets, image);
  const int64_t *const label = labels.const_data_ptr<int64_t>(), *const where = image.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n.targets; ++i) {
    TORCH_CHECK_INDEX(label[i] >= 0 && label[i] < n.classes, "label ", label[i], " of target ", i, ": there are ",
                      n.classes, " classes");
    TORCH_CHECK_INDEX(where[i] >= 0 && where[i] < n.batch, "target ", i, " is in image ", where[i], ": there are ",
                      n.batch);
  }
  at::Tensor costs = at::empty({n.targets, n.layers, n.slots}, logits.options().dtype(at::kFloat));
  if (costs.numel() == 0) {
    return costs;
  }
  const CostWeights weights{static_cast<float>(class_weight), static_cast<float>(l1_weight),
                            static_cast<float>(giou_weight), static_cast<float>(giou_eps)};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "pair_costs_logits", [&] {
    using logit_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, boxes.scalar_type(), "pair_costs_boxes", [&] {
      compute<logit_t, scalar_t>(logits.const_data_ptr<logit_t>(), boxes.const_data_ptr<scalar_t>(), label, where,
                                 targets.const_data_ptr<float>(), n, weights, costs.mutable_data_ptr<float>());
    });
  });
  return costs;
}

}  // namespace
}  // namespace assigndetr

TORCH_LIBRARY_FRAGMENT(assigndetr_ext, m) {
  m.def(
      "pair_costs_cpu(Tensor logits, Tensor boxes, Tensor labels, Tensor targets, Tensor image, float class_weight,"
      " float l1_weight, float giou_weight, float giou_eps) -> Tensor",
      &assigndetr::pair_costs_cpu);
}
