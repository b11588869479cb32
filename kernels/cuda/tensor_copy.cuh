// Hopper's bulk tensor copies into shared memory, and the barriers in shared memory that count what has arrived.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace pagedcore::cuda {

inline CUtensorMap encode_tensor_map(const void* matrix, int rank, const cuuint64_t* sizes, const cuuint64_t* strides,
                                     const cuuint32_t* box) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("cuTensorMapEncodeTiled: not in this driver");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map{};
  const cuuint32_t steps[3] = {1, 1, 1};
  // The copies move bits: one 16-bit type serves both.
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, rank, const_cast<void*>(matrix), sizes, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  return map;
}

// A matrix of `row_elements` 16-bit elements a row, copied in boxes of `box_rows` rows by 64 elements, with the
// 128-byte swizzle. The number of rows is not stated: the block table is trusted.
inline CUtensorMap make_tensor_map(const void* matrix, int row_elements, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_elements), cuuint64_t{1} << 31};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_elements) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  return encode_tensor_map(matrix, 2, sizes, strides, box);
}

// A matrix of 16-bit elements, `columns` a multiple of 64, its rows `row_stride` elements apart, copied in stacks: of
// `box_rows` rows, `stack` pieces of 64 elements, one such box after the other. What lies outside arrives as zeros.
inline CUtensorMap make_stack_map(const void* matrix, int rows, int columns, int64_t row_stride, int box_rows,
                                  int stack) {
  const cuuint64_t sizes[3] = {64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(columns / 64)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_stride) * 2, 128};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(stack)};
  return encode_tensor_map(matrix, 3, sizes, strides, box);
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After barrier_init, before the copy engine meets the barriers.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and let the phase last until `bytes` more have been copied.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait for the end of the barrier's phase number `phase` (0, 1, ...), which may be the current or the one before.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int phase) {
  asm volatile(
      "{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra wait; }" ::"r"(
          barrier),
      "r"(phase & 1)
      : "memory");
}

// Copy the box at (column, row) to shared memory; its bytes count for `barrier`.
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(target),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Copy the stack of boxes that starts at (64 * piece, row).
__device__ __forceinline__ void copy_stack(uint32_t target, const CUtensorMap* map, int piece, int row,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(target),
      "l"(map), "r"(0), "r"(row), "r"(piece), "r"(barrier)
      : "memory");
}

// The same, of what is not read again soon: it leaves the L2 cache first.
__device__ __forceinline__ void copy_stack_once(uint32_t target, const CUtensorMap* map, int piece, int row,
                                                uint32_t barrier) {
  constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // what createpolicy.fractional.L2::evict_first makes, for all
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3, %4}], [%5], %6;" ::"r"(target),
      "l"(map), "r"(0), "r"(row), "r"(piece), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}

// Barriers among `threads` threads of a block, by number; 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace pagedcore::cuda
