// Hopper's warpgroup matrix instructions (PTX ISA, "asynchronous warpgroup level matrix instructions"): A in registers,
// B in shared memory.
#pragma once

#include "common.cuh"

namespace pagedcore::cuda {

// Rows of 128 bytes, each 16-byte chunk placed by exclusive or with its row's low bits: the instructions' 128-byte
// swizzle. Wider rows are cut into columns of 128 bytes, one after the other. The whole starts at a multiple of 1024
// bytes.
template <int kHeadDim, int kNumRows>
struct WgmmaLayout {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kColumnBytes = kNumRows * 128;

  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(chunk / 8 * kColumnBytes + row * 128 + ((chunk % 8) ^ (row & 7)) * 16);
  }
};

// Descriptor of a matrix in that layout. `leading`: bytes from one column of 128 bytes to the next, used where rows are
// k.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared, uint32_t leading) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | (static_cast<uint64_t>(leading / 16) << 16) | ((shared & 0x3FFFF) / 16);
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Make this thread's writes to shared memory visible to the matrix instructions.
__device__ __forceinline__ void publish_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define PAGEDCORE_WGMMA_64(type)                                                                                  \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
               " {"                                                                                               \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                   \
               "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38; }"                                                    \
               : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),        \
                 "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),        \
                 "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),        \
                 "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),        \
                 "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),        \
                 "+f"(d[7][2]), "+f"(d[7][3])                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposed))

#define PAGEDCORE_WGMMA_128(type)                                                                                  \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type \
               " {"                                                                                                \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                            \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                    \
               "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70; }"                                                     \
               : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),         \
                 "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),         \
                 "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),         \
                 "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),         \
                 "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),         \
                 "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]),         \
                 "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]), "+f"(d[10][1]),       \
                 "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),   \
                 "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]),   \
                 "+f"(d[13][2]), "+f"(d[13][3]), "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]),   \
                 "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposed))

// d[64, 8 * kBlocks] (+)= a[64, 16] b[16, 8 * kBlocks]. kTransposed: b's rows in shared memory are k, else they are n.
template <typename T, int kTransposed, int kBlocks>
__device__ __forceinline__ void wgmma(float (&d)[kBlocks][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kBlocks == 8) PAGEDCORE_WGMMA_64("f16");
    if constexpr (kBlocks == 16) PAGEDCORE_WGMMA_128("f16");
  } else {
    if constexpr (kBlocks == 8) PAGEDCORE_WGMMA_64("bf16");
    if constexpr (kBlocks == 16) PAGEDCORE_WGMMA_128("bf16");
  }
}

#undef PAGEDCORE_WGMMA_64
#undef PAGEDCORE_WGMMA_128

}  // namespace pagedcore::cuda
