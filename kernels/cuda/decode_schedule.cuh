// How the decode attention's work is cut up among the thread blocks.
#pragma once

#include "attention.cuh"

namespace pagedcore::cuda {

// A position in the sequence of all tiles.
struct TileCursor {
  int row;
  int item;   // of the row: KV head * head_groups + group
  int tile;   // of the item
  int tiles;  // of each item of this row
  int length;
  int token;  // index of the row's query
};

__device__ __forceinline__ int decode_length(const PagedAttention& a, int row) {
  return is_decode_row(a, a.query_start_loc[row + 1] - a.query_start_loc[row]) ? a.seq_lens[row] : 0;
}

// Set the cursor to the first tile of row `row`, which may have none.
template <int kTileTokens>
__device__ __forceinline__ void enter_row(const PagedAttention& a, int row, TileCursor& cursor) {
  cursor.row = row;
  cursor.item = cursor.tile = 0;
  cursor.length = decode_length(a, row);
  cursor.tiles = ceil_div(cursor.length, kTileTokens);
  cursor.token = a.query_start_loc[row];
}

template <int kTileTokens>
__device__ __forceinline__ void advance(const PagedAttention& a, int items_per_row, TileCursor& cursor) {
  if (++cursor.tile < cursor.tiles) return;
  cursor.tile = 0;
  if (++cursor.item < items_per_row) return;
  do {
    enter_row<kTileTokens>(a, cursor.row + 1, cursor);
  } while (cursor.tiles == 0);
}

struct DecodeSchedule {
  int total_tiles;
  int tiles_per_block;
  bool has_padding;  // rows without tokens, or tokens behind the last row
  TileCursor first;  // where this thread block starts
};

// Find this thread block's stretch: a prefix sum over the rows' tiles, done by every block for itself.
template <int kThreads, int kTileTokens>
__device__ DecodeSchedule find_schedule(const PagedAttention& a, const AttentionPlan& plan, int items_per_row) {
  __shared__ int warp_sums[kThreads / kWarpSize];
  __shared__ TileCursor found;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int rows_per_thread = ceil_div(a.num_rows, kThreads);
  const int begin = min(static_cast<int>(threadIdx.x) * rows_per_thread, a.num_rows);
  const int end = min(begin + rows_per_thread, a.num_rows);
  int own = 0;
  bool has_padding = begin < end && end == a.num_rows && a.query_start_loc[end] < a.num_tokens;
  for (int row = begin; row < end; ++row) {
    own += ceil_div(decode_length(a, row), kTileTokens);
    has_padding |= a.seq_lens[row] == 0;
  }
  int inclusive = own;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  DecodeSchedule schedule;
  schedule.has_padding = __syncthreads_or(has_padding);
  int before = inclusive - own, total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarpSize; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  schedule.total_tiles = total * items_per_row;
  schedule.tiles_per_block = max(ceil_div(schedule.total_tiles, gridDim.x), plan.min_tiles);
  const int start = blockIdx.x * schedule.tiles_per_block;
  before *= items_per_row;
  if (start >= before && start < before + own * items_per_row) {
    TileCursor cursor;
    for (int row = begin;; ++row) {
      enter_row<kTileTokens>(a, row, cursor);
      if (start < before + cursor.tiles * items_per_row) break;
      before += cursor.tiles * items_per_row;
    }
    cursor.item = (start - before) / cursor.tiles;
    cursor.tile = (start - before) % cursor.tiles;
    found = cursor;
  }
  __syncthreads();
  schedule.first = found;
  return schedule;
}

}  // namespace pagedcore::cuda
