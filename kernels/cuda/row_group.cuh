// The threads that work on one row of logits: a cluster of thread blocks where the device has clusters, else one block.
#pragma once

#include <cooperative_groups.h>

#include "sample_math.cuh"

namespace pagedcore::cuda {

constexpr int kRowThreads = 512;
constexpr int kMaxRowBlocks = 8;  // of a cluster; one on devices before compute capability 9.0
constexpr int kMaxTotals = 8;

// Sums and maxima over a row's threads. They are over integers, so their order does not matter: every run gives the
// same result.
class RowGroup {
 public:
  struct Shared {
    unsigned long long block[2][kMaxTotals];
    unsigned long long row[kMaxTotals];
  };

  __device__ explicit RowGroup(Shared& shared) : shared_(shared) {
    if (threadIdx.x < 2 * kMaxTotals) (&shared.block[0][0])[threadIdx.x] = 0;
    synchronize();
  }

  __device__ static int num_blocks() {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
    return 1;
#endif
  }
  __device__ static int block_rank() {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
    return 0;
#endif
  }
  __device__ static int row() { return blockIdx.x / num_blocks(); }

  // Sum each of `values` over the row's threads.
  template <int kCount>
  __device__ void sum(uint64_t (&values)[kCount]) {
    combine<kCount>(
        values, [](uint64_t a, uint64_t b) { return a + b; },
        [](unsigned long long* target, uint64_t value) { atomicAdd(target, static_cast<unsigned long long>(value)); });
  }

  // The largest of each of `values` over the row's threads.
  template <int kCount>
  __device__ void maximum(uint64_t (&values)[kCount]) {
    combine<kCount>(
        values, [](uint64_t a, uint64_t b) { return a > b ? a : b; },
        [](unsigned long long* target, uint64_t value) { atomicMax(target, static_cast<unsigned long long>(value)); });
  }

  __device__ static void synchronize() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
  }

 private:
  template <int kCount, typename Operation, typename AtomicOperation>
  __device__ void combine(uint64_t (&values)[kCount], Operation operation, AtomicOperation atomic_operation) {
    static_assert(kCount <= kMaxTotals);
    unsigned long long* own = shared_.block[turn_];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        values[i] = operation(values[i], __shfl_xor_sync(kAllLanes, values[i], offset));
      }
      if (threadIdx.x % kWarpSize == 0) atomic_operation(own + i, values[i]);
    }
    synchronize();
    if (threadIdx.x < kCount) {
      uint64_t total = 0;
      for (int rank = 0; rank < num_blocks(); ++rank) total = operation(total, *of_block(own + threadIdx.x, rank));
      shared_.row[threadIdx.x] = total;
    }
    // The other set was last read before the barrier above, by every block.
    if (threadIdx.x < kMaxTotals) shared_.block[1 - turn_][threadIdx.x] = 0;
    turn_ = 1 - turn_;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = shared_.row[i];
  }

  __device__ static unsigned long long* of_block(unsigned long long* pointer, int rank) {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(pointer, rank);
#else
    return pointer;
#endif
  }

  Shared& shared_;
  int turn_ = 0;
};

// A row of logits, dealt out to the row's threads four consecutive entries at a time.
struct RowLogits {
  const float* logits;
  int size;
  bool is_aligned;

  __device__ RowLogits(const float* first, int64_t row_stride, int vocab_size)
      : logits(first + RowGroup::row() * row_stride),
        size(vocab_size),
        is_aligned(reinterpret_cast<uintptr_t>(logits) % 16 == 0) {}

  // body(first index, four logits); entries behind the end are -inf.
  template <typename Body>
  __device__ __forceinline__ void for_each_four(Body body) const {
    const int step = RowGroup::num_blocks() * kRowThreads * 4;
#pragma unroll 4
    for (int i = (RowGroup::block_rank() * kRowThreads + static_cast<int>(threadIdx.x)) * 4; i < size; i += step) {
      float values[4];
      if (is_aligned && i + 4 <= size) {
        const float4 loaded = *reinterpret_cast<const float4*>(logits + i);
        values[0] = loaded.x, values[1] = loaded.y, values[2] = loaded.z, values[3] = loaded.w;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = i + j < size ? logits[i + j] : -INFINITY;
      }
      body(i, values);
    }
  }
};

// The row's largest logit with its index, as `ranked`; 0 when the row has no distribution: a NaN, a +inf or nothing but
// -inf in it.
__device__ __forceinline__ uint64_t row_maximum(RowGroup& group, const RowLogits& row) {
  float largest = -INFINITY;
  int index = 0;
  bool is_bad = false;
  row.for_each_four([&](int first, const float (&values)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      is_bad |= !(values[j] < INFINITY);
      if (values[j] > largest) largest = values[j], index = first + j;
    }
  });
  uint64_t keys[2] = {ranked(largest, index), is_bad ? 1u : 0u};
  group.maximum(keys);
  return keys[1] != 0 || ranked_value(keys[0]) == -INFINITY ? 0 : keys[0];
}

// Launch one group of threads for each row: the fewer rows, the more thread blocks to each.
template <typename Operation>
void launch_rows(void (*kernel)(Operation), const Operation& operation, Stream stream) {
  if (operation.num_rows == 0) return;
  const bool has_clusters = device_info().has_dependent_launch;
  unsigned row_blocks = has_clusters ? kMaxRowBlocks : 1;
  while (row_blocks > 1 && row_blocks * operation.num_rows > 4 * device_info().num_multiprocessors) row_blocks /= 2;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {row_blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = operation.num_rows * row_blocks;
  config.blockDim = kRowThreads;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = has_clusters ? 2 : 0;
  check(cudaLaunchKernelEx(&config, kernel, operation), "kernel launch");
}

}  // namespace pagedcore::cuda
