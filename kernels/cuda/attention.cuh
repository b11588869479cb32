// What the decode and the prefill attention kernels share: the shared-memory layout of a tile and the addresses of
// cached tokens.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace pagedcore::cuda {

constexpr float kLog2e = 1.4426950408889634f;
// A maximum no score is below: finite, so that a difference of two of them is 0 and not NaN.
constexpr float kNoScore = -1e30f;

// Rows of head_dim 16-bit elements in shared memory, in chunks of 16 bytes. Chunks are placed so that eight consecutive
// rows of one chunk column lie in different banks: by exclusive or where a row has a multiple of eight chunks, by an
// odd pitch elsewhere.
template <int kHeadDim>
struct TileLayout {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr bool kSwizzled = kChunks % 8 == 0;
  static constexpr int kPitch = kSwizzled ? kChunks : (kChunks | 1);
  static constexpr int kRowBytes = kPitch * 16;
  static_assert(kHeadDim % 16 == 0);

  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kRowBytes + (kSwizzled ? (chunk ^ (row & 7)) : chunk) * 16);
  }
};

// How an operation is laid out on the device, worked out on the host.
struct AttentionPlan {
  int block_shift;    // log2(block_size)
  int heads_per_kv;   // query heads that share a KV head
  int head_groups;    // decode: groups of query heads that a KV head's queries are worked on in
  int min_tiles;      // decode: fewer tiles than this are not worth a thread block of their own
  int64_t kv_stride;  // elements from one (block, KV head) to the next: block_size * head_dim
};

AttentionPlan plan_attention(const PagedAttention& a);

// Attention of the rows with one query, and zeros in padding; of the rows with more queries. Instantiated for half and
// bfloat16.
template <typename T>
void decode(const PagedAttention& a, Stream stream);
template <typename T>
void prefill(const PagedAttention& a, Stream stream);
extern template void decode<__nv_bfloat16>(const PagedAttention&, Stream);
extern template void decode<__half>(const PagedAttention&, Stream);
extern template void prefill<__nv_bfloat16>(const PagedAttention&, Stream);
extern template void prefill<__half>(const PagedAttention&, Stream);

// These rows are decode's work, the others prefill's. Where a query's bits must not depend on the batch, all are
// prefill's: it works through a query's context tile by tile from its first token on, whatever the tile of queries, the
// others in it and the chunk that the query came in; decode cuts the context where that evens out the thread blocks'
// work.
__device__ __forceinline__ bool is_decode_row(const PagedAttention& a, int query_len) {
  return query_len == 1 && !a.batch_invariant;
}

// Call `body` with a std::integral_constant of a supported head_dim.
template <typename Body>
void dispatch_head_dim(int head_dim, Body&& body) {
  switch (head_dim) {
    case 64:
      return body(std::integral_constant<int, 64>{});
    case 80:
      return body(std::integral_constant<int, 80>{});
    case 96:
      return body(std::integral_constant<int, 96>{});
    case 128:
      return body(std::integral_constant<int, 128>{});
    case 256:
      return body(std::integral_constant<int, 256>{});
  }
  throw std::invalid_argument("head_dim: the CUDA attention kernels support 64, 80, 96, 128 and 256, got " +
                              std::to_string(head_dim));
}

}  // namespace pagedcore::cuda
