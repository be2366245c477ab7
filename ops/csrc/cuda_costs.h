// The costs of all pairs of targets and slots of their images, on the GPU: one thread per pair, one launch for all
// images and layers. No PyTorch here, so that tests can compile and run the kernel alone.
//
// The includer defines ASSIGNDETR_ASSERT(condition) for the device and ASSIGNDETR_LAUNCH(kernel, grid, stream).
#pragma once

#include "cuda_grid.h"
#include "pair_cost.h"

namespace assigndetr {

// Write costs (targets, layers, slots). Neighbouring threads take neighbouring slots of one target: only the reading of
// their logits is scattered.
template <typename logit_t, typename box_t>
__global__ void __launch_bounds__(kThreads)
    pair_costs(const logit_t* __restrict__ logits, const box_t* __restrict__ boxes, const int64_t* __restrict__ labels,
               const int64_t* __restrict__ images, const float* __restrict__ targets, const CostSizes n,
               const CostWeights weights, float* __restrict__ costs) {
  const int64_t count = n.targets * n.layers * n.slots, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t row = i / n.slots, slot = i - row * n.slots, target = row / n.layers, layer = row - target * n.layers;
    const int64_t label = labels[target], image = images[target];
    ASSIGNDETR_ASSERT(label >= 0 && label < n.classes && image >= 0 && image < n.batch);
    const box_t* const box = boxes + layer * n.box_layer + image * n.box_image + slot * n.box_slot;
    const float* const own = targets + 4 * target;
    const int64_t at = layer * n.logit_layer + image * n.logit_image + slot * n.logit_slot + label * n.logit_class;
    costs[i] = pair_cost<LibraryMath>(static_cast<float>(logits[at]), static_cast<float>(box[0]),
                                      static_cast<float>(box[n.box_number]), static_cast<float>(box[2 * n.box_number]),
                                      static_cast<float>(box[3 * n.box_number]), {own[0], own[1], own[2], own[3]},
                                      weights);
  }
}

template <typename logit_t, typename box_t, typename Stream>
void launch_pair_costs(const logit_t* logits, const box_t* boxes, const int64_t* labels, const int64_t* images,
                       const float* targets, const CostSizes& n, const CostWeights& weights, float* costs,
                       Stream stream) {
  ASSIGNDETR_LAUNCH((pair_costs<logit_t, box_t>), plain_grid(n.targets * n.layers * n.slots), stream)
  (logits, boxes, labels, images, targets, n, weights, costs);
}

}  // namespace assigndetr
