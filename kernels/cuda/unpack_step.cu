// A step's packed buffer, spread to where the step's kernels read it: one launch, part of the step's graph.
#include "common.cuh"

namespace pagedcore::cuda {
namespace {

constexpr int kThreads = 128;
// pagedcore/engine/step_plan.py: StepLayout and Header
constexpr int64_t kHeaderSize = 16;
constexpr int kTableWidth = 2;

// A thread block to each row; all of them share the token ids.
__global__ void __launch_bounds__(kThreads) unpack_step_kernel(const __grid_constant__ UnpackStep a) {
  wait_for_previous_kernel();
  // No allow_next_kernel(): attention reads the tables ahead of its wait, so nothing may start before they are written.
  const int row = blockIdx.x, thread = threadIdx.x;
  for (int i = row * kThreads + thread; i < a.num_tokens; i += gridDim.x * kThreads) {
    const int32_t id = a.packed[kHeaderSize + i];
    // A row whose logits were not finite drew -1. Its next step is under way already, to be dropped; any id will do.
    a.token_ids[i] = id >= 0 ? id : max(a.last_token_ids[-1 - id], 0);
  }
  const int width = a.packed[kTableWidth];
  const int32_t* tables = a.packed + kHeaderSize + 3 * int64_t{a.num_tokens} + 2 * int64_t{a.num_rows} + 1;
  const int32_t* sampling = tables + int64_t{a.num_rows} * width;
  for (int i = thread; i < width; i += kThreads) {
    a.block_tables[row * int64_t{a.table_stride} + i] = tables[row * int64_t{width} + i];
  }
  if (thread < kNumSamplingColumns) {
    const int64_t at = row * int64_t{kNumSamplingColumns} + thread;
    a.sampling[at] = sampling[at];
  }
}

}  // namespace

void unpack_step(const UnpackStep& a, Stream stream) {
  if (a.num_rows == 0) return;
  launch(unpack_step_kernel, a.num_rows, kThreads, 0, stream, a);
}

}  // namespace pagedcore::cuda
