// How CPU attention is cut into work, and the interface of the code that computes one piece of it for one instruction
// set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops.h"

namespace pagedcore::cpu {

// The softmax is taken over chunks of this many positions, each from scratch, and the chunks are merged in order. The
// borders depend on nothing but the position, so a query's result is the same, bit for bit, however the work around it
// is cut.
constexpr int kAttentionChunk = 256;

// Some queries of one row for one KV head and all query heads that share it, over some chunks of the row's context.
// A tile has `num_queries * (num_heads / num_kv_heads)` lines, the heads of one query next to each other.
struct AttentionTile {
  int32_t row;
  int32_t kv_head;
  int32_t first_query;  // counted in the whole batch
  int32_t num_queries;
  int32_t first_position;  // of the first query
  int32_t first_chunk;
  int32_t num_chunks;
};

// The state of a line: its weighted sum of values [head_dim], then the largest score and the sum of the weights.
constexpr int attention_state_size(int head_dim) { return head_dim + 16; }

// One instruction set's and dtype's implementation.
struct AttentionKernel {
  // Floats that `compute` needs as scratch for a tile of `num_lines` lines.
  std::size_t (*scratch_size)(const PagedAttention& op, int num_lines);
  // Attend to the tile's chunks; writes the output, or, with `partial`, the states of the lines ([num_lines, state
  // size]). The chunks of a tile with `partial` are one chunk. `next` is what this thread computes next, a tile without
  // queries where nothing is known: its keys are fetched from memory meanwhile.
  void (*compute)(const PagedAttention& op, const AttentionTile& tile, const AttentionTile& next, float* scratch,
                  float* partial);
  // Merge the partial states of all chunks of a tile, in order, and write the output. Overwrites the first chunk's
  // states.
  void (*combine)(const PagedAttention& op, const AttentionTile& tile, float* partials);
};

AttentionKernel attention_kernel_generic(DType dtype);
AttentionKernel attention_kernel_avx2(DType dtype);
AttentionKernel attention_kernel_avx512(DType dtype);
AttentionKernel attention_kernel_avx512_bf16();  // bfloat16 products in pairs

}  // namespace pagedcore::cpu
