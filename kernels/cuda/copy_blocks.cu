// Copies of whole KV blocks in one launch: copy-on-write within a cache, swapping with host memory the device can
// address (pinned).
#include "common.cuh"

namespace pagedcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

__global__ void __launch_bounds__(kThreads) copy_blocks_kernel(const __grid_constant__ CopyBlocks a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t num_chunks = a.block_bytes / 16;
  const int pair = blockIdx.x, plane = blockIdx.y;
  const int64_t source = a.pairs[2 * pair], target = a.pairs[2 * pair + 1];
  const uint4* src = reinterpret_cast<const uint4*>(static_cast<const char*>(a.src) + plane * a.src_plane_stride +
                                                    source * a.src_block_stride);
  uint4* dst =
      reinterpret_cast<uint4*>(static_cast<char*>(a.dst) + plane * a.dst_plane_stride + target * a.dst_block_stride);
  for (int64_t base = threadIdx.x; base < num_chunks; base += kThreads * kUnroll) {
    uint4 held[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (base + i * kThreads < num_chunks) held[i] = src[base + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (base + i * kThreads < num_chunks) dst[base + i * kThreads] = held[i];
    }
  }
}

}  // namespace

void copy_blocks(const CopyBlocks& a, Stream stream) {
  if (a.num_pairs == 0 || a.num_planes == 0) return;
  if (a.block_bytes % 16 != 0 || a.num_planes > 65535) {
    throw std::invalid_argument(
        "block_bytes: the CUDA copy_blocks needs a multiple of 16 and at most 65535 planes, got " +
        std::to_string(a.block_bytes) + " bytes and " + std::to_string(a.num_planes) + " planes");
  }
  launch(copy_blocks_kernel, dim3(a.num_pairs, a.num_planes), kThreads, 0, stream, a);
}

}  // namespace pagedcore::cuda
