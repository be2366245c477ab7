// Many assignment problems in one call on the GPU. Called by ops/assignment.py.
// No call waits for the device, and all memory comes from PyTorch's allocators.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstring>

#include "problem_check.h"

#define ASSIGNDETR_LAUNCH_BLOCKS(kernel, blocks, threads, bytes, stream) \
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>
#define ASSIGNDETR_SHARED(name) extern __shared__ __align__(16) char name[]
#include "cuda_assignment.h"

namespace assigndetr {
namespace {

// The most shared memory that a block may ask for.
int64_t largest_shared_memory(int device) {
  int bytes = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Return (3, P) on the device of the costs, as `assign` does. Costs that are not finite count as `unmatchable`.
at::Tensor assign_cuda(const at::Tensor& costs, const at::Tensor& problems, double unmatchable) {
  TORCH_CHECK_VALUE(costs.is_cuda(), "costs must be on a GPU, found ", costs.device());
  TORCH_CHECK_VALUE(std::isfinite(static_cast<float>(unmatchable)), "unmatchable must be a finite float32, found ",
                    unmatchable);
  const c10::cuda::CUDAGuard guard(costs.device());
  const float* const data = costs.const_data_ptr<float>();
  const int64_t shared = largest_shared_memory(costs.get_device());
  const AssignmentPlan plan = plan_assignment(read_problems(costs, problems), data, shared);
  const auto options = costs.options();
  at::Tensor pairs = at::empty({3, plan.pairs}, options.dtype(at::kLong));
  if (plan.tasks.empty()) {
    return pairs;
  }
  // From pinned memory, or the copy would wait for what the device is doing.
  const int64_t count = static_cast<int64_t>(plan.tasks.size());
  at::Tensor host = at::empty({count, kTaskFields}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
  std::memcpy(host.mutable_data_ptr<int64_t>(), plan.tasks.data(), count * sizeof(Task));
  const at::Tensor tasks = host.to(costs.device(), /*non_blocking=*/true);
  at::Tensor scratch = at::empty({plan.scratch_bytes}, options.dtype(at::kByte));
  if (plan.large_bytes > kSmallBytes - 2048) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(solve_assignment<kLargeWarps>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared - 2048)));  // the same for all threads of the host
  }
  launch_assignment(plan, data, reinterpret_cast<const Task*>(tasks.const_data_ptr<int64_t>()),
                    static_cast<float>(unmatchable), reinterpret_cast<char*>(scratch.mutable_data_ptr<uint8_t>()),
                    pairs.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return pairs;
}

}  // namespace
}  // namespace assigndetr

TORCH_LIBRARY_FRAGMENT(assigndetr_ext, m) {
  m.def("assign_cuda(Tensor costs, Tensor problems, float unmatchable) -> Tensor", &assigndetr::assign_cuda);
}
