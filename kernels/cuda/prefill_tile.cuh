// What the prefill attention kernels share: which rows a thread block has, the loads of its K and V, softmax, and the
// output.
#pragma once

#include "attention.cuh"

namespace pagedcore::cuda {

// What one thread block works on.
struct PrefillTile {
  int row;
  int first_pair;  // of the row's query_len * heads_per_kv
  int num_pairs;   // of the row
  int query_start;
  int context;  // tokens before the row's first query
};

// The tiles of tokens that a thread block's rows see: [0, end), of which those from `first_masked` on not by all rows.
struct TokenTiles {
  int end;
  int first_masked;
};

template <typename Config>
__device__ __forceinline__ TokenTiles token_tiles(const PrefillTile& tile, int heads_per_kv) {
  const int last_pair = min(tile.first_pair + Config::kRows, tile.num_pairs) - 1;
  return {(tile.context + last_pair / heads_per_kv) / Config::kTokens + 1,
          (tile.context + tile.first_pair / heads_per_kv + 1) / Config::kTokens};
}

__device__ __forceinline__ int prefill_pairs(const PagedAttention& a, int row, int heads_per_kv) {
  const int query_len = a.query_start_loc[row + 1] - a.query_start_loc[row];
  return is_decode_row(a, query_len) || a.seq_lens[row] == 0 ? 0 : query_len * heads_per_kv;
}

// Which rows have which tiles: a prefix sum over the rows, made by every thread block for itself.
template <int kThreads, int kRows>
struct TileIndex {
  int warp_sums[kThreads / kWarpSize];
  int starts[kThreads + 1];  // tiles before those of thread i's rows

  // By all threads of the block; returns the number of tiles.
  __device__ int build(const PagedAttention& a, const AttentionPlan& plan) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int rows_per_thread = ceil_div(a.num_rows, kThreads);
    const int begin = min(static_cast<int>(threadIdx.x) * rows_per_thread, a.num_rows);
    const int end = min(begin + rows_per_thread, a.num_rows);
    int own = 0;
    for (int row = begin; row < end; ++row) own += ceil_div(prefill_pairs(a, row, plan.heads_per_kv), kRows);
    int inclusive = own;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int below = __shfl_up_sync(kAllLanes, inclusive, offset);
      if (lane >= offset) inclusive += below;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < kThreads / kWarpSize; ++w) {
      if (w < warp) inclusive += warp_sums[w];
      total += warp_sums[w];
    }
    starts[threadIdx.x] = inclusive - own;
    if (threadIdx.x == 0) starts[kThreads] = total;
    __syncthreads();
    return total;
  }

  // By any thread, after build().
  __device__ PrefillTile find(const PagedAttention& a, const AttentionPlan& plan, int wanted) const {
    int low = 0, high = kThreads;  // starts[low] <= wanted < starts[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (starts[middle] <= wanted ? low : high) = middle;
    }
    int row = low * ceil_div(a.num_rows, kThreads), before = starts[low], pairs = 0;
    for (;; ++row) {
      pairs = prefill_pairs(a, row, plan.heads_per_kv);
      if (wanted < before + ceil_div(pairs, kRows)) break;
      before += ceil_div(pairs, kRows);
    }
    const int query_start = a.query_start_loc[row];
    const int query_len = a.query_start_loc[row + 1] - query_start;
    return {row, (wanted - before) * kRows, pairs, query_start, a.seq_lens[row] - query_len};
  }
};

template <typename Config, typename T>
struct KVReader {
  __device__ __forceinline__ KVReader(const PagedAttention& a, const AttentionPlan& plan, int row, int kv_head)
      : table(a.block_tables + int64_t{row} * a.table_stride),
        k_cache(static_cast<const T*>(a.k_cache) + kv_head * plan.kv_stride),
        v_cache(static_cast<const T*>(a.v_cache) + kv_head * plan.kv_stride),
        block_stride(a.num_kv_heads * plan.kv_stride),
        block_shift(plan.block_shift),
        length(a.seq_lens[row]) {}

  const int32_t* table;
  const T* k_cache;  // of this KV head, in block 0
  const T* v_cache;
  int64_t block_stride;
  int block_shift, length;
  int block_id;  // lane i: the block of the tile's tokens 16 i ...

  __device__ __forceinline__ void find_blocks(int tile) {
    const int token = tile * Config::kTokens + static_cast<int>(threadIdx.x % kWarpSize) * 16;
    block_id = threadIdx.x % kWarpSize < Config::kTokens / 16 && token < length ? table[token >> block_shift] : 0;
  }

  __device__ __forceinline__ void load(const T* cache, int tile, uint32_t target) const {
    constexpr int kChunks = Config::Layout::kChunks;
#pragma unroll
    for (int i = 0; i < Config::kTokens * kChunks / Config::kThreads; ++i) {
      const int index = i * Config::kThreads + threadIdx.x;
      const int row = index / kChunks, chunk = index % kChunks;
      const int token = tile * Config::kTokens + row;
      const int block = __shfl_sync(kAllLanes, block_id, row / 16);
      const T* source = cache + block * block_stride + (token & ((1 << block_shift) - 1)) * (kChunks * 8) + chunk * 8;
      // Slots behind the sequence's end may hold anything, NaN too: they are read as zeros.
      copy_async(target + Config::Layout::offset(row, chunk), source, token < length ? 16 : 0);
    }
  }
};

// Start the copies of `num_rows` rows of queries from `first_row` of the tile on, by `num_threads` threads of which
// this is number `thread`.
template <typename Config, typename T>
__device__ __forceinline__ void load_queries(const PagedAttention& a, const AttentionPlan& plan,
                                             const PrefillTile& tile, int kv_head, uint32_t target, int first_row,
                                             int num_rows, int thread, int num_threads) {
  constexpr int kChunks = Config::QueryLayout::kChunks;
  for (int index = thread; index < num_rows * kChunks; index += num_threads) {
    const int row = first_row + index / kChunks, chunk = index % kChunks;
    const int pair = tile.first_pair + row;
    const bool exists = pair < tile.num_pairs;
    const int query = exists ? pair / plan.heads_per_kv : 0, head = exists ? pair % plan.heads_per_kv : 0;
    const T* source = static_cast<const T*>(a.q) + (tile.query_start + query) * a.q_row_stride +
                      (kv_head * plan.heads_per_kv + head) * (kChunks * 8) + chunk * 8;
    copy_async(target + Config::QueryLayout::offset(row, chunk), source, exists ? 16 : 0);
  }
  commit_copies();
}

// One warp's rows: running softmax and output. Row r of tile m is lane / 4 + 8 r.
template <typename Config, typename T>
struct PrefillState {
  static constexpr int kColumns = Config::kTokens / 8;  // blocks of eight tokens
  float out[Config::kRowTiles][Config::kSteps * 2][4];
  float maximum[Config::kRowTiles][2];
  float sum[Config::kRowTiles][2];
  int position[Config::kRowTiles][2];  // the last token a row sees; -1: the row does not exist

  __device__ __forceinline__ void begin(const AttentionPlan& plan, const PrefillTile& tile) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int pair = tile.first_pair + warp * Config::kWarpRows + m * 16 + r * 8 + lane / 4;
        position[m][r] = pair < tile.num_pairs ? tile.context + pair / plan.heads_per_kv : -1;
        maximum[m][r] = kNoScore;
        sum[m][r] = 0.f;
      }
#pragma unroll
      for (int n = 0; n < Config::kSteps * 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] = 0.f;
      }
    }
  }

  // Turn scores into weights; `correction` brings the outputs so far to the new maximum. A tile of which a row sees
  // nothing leaves that row's bits as they are: the maximum stays, the correction is 1, the weights are 0. The fused
  // operations are written out, lest the compiler fuse differently for masked and other tiles, or for two of the rows.
  template <bool kMasked>
  __device__ __forceinline__ void weigh(float (&s)[Config::kRowTiles][kColumns][4], int first_token, float scale_log2,
                                        float (&correction)[Config::kRowTiles][2]) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = maximum[m][r];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& value = s[m][n][2 * r + c];
            if (kMasked && first_token + n * 8 + lane % 4 * 2 + c > position[m][r]) value = -INFINITY;
            largest = fmaxf(largest, value);
          }
        }
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        correction[m][r] = exp2_fast((maximum[m][r] - largest) * scale_log2);
        const float shift = largest * scale_log2;
        maximum[m][r] = largest;
        float total = 0.f;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& value = s[m][n][2 * r + c];
            value = exp2_fast(__fmaf_rn(value, scale_log2, -shift));
            total += value;
          }
        }
        sum[m][r] = __fmaf_rn(sum[m][r], correction[m][r], total);
      }
    }
  }

  __device__ __forceinline__ void weigh(float (&s)[Config::kRowTiles][kColumns][4], int first_token, bool is_masked,
                                        float scale_log2, float (&correction)[Config::kRowTiles][2]) {
    if (is_masked) {
      weigh<true>(s, first_token, scale_log2, correction);
    } else {
      weigh<false>(s, first_token, scale_log2, correction);
    }
  }

  __device__ __forceinline__ void rescale(const float (&correction)[Config::kRowTiles][2]) {
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Config::kSteps * 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] *= correction[m][i / 2];
      }
    }
  }

  // Weights of tokens 16 k ... as the left operand of the product with the values.
  __device__ __forceinline__ static void pack_weights(uint32_t (&weights)[4], const float (&s)[kColumns][4], int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = pack<T>(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
  }

  __device__ __forceinline__ void store(const PagedAttention& a, const AttentionPlan& plan, const PrefillTile& tile,
                                        int kv_head) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = sum[m][r];
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        const int pair = tile.first_pair + warp * Config::kWarpRows + m * 16 + r * 8 + lane / 4;
        if (pair >= tile.num_pairs) continue;
        const int64_t query = tile.query_start + pair / plan.heads_per_kv;
        const int head = kv_head * plan.heads_per_kv + pair % plan.heads_per_kv;
        T* row = static_cast<T*>(a.out) + (query * a.num_heads + head) * (Config::kSteps * 16) + lane % 4 * 2;
        const float scale = 1.f / total;
#pragma unroll
        for (int n = 0; n < Config::kSteps * 2; ++n) {
          *reinterpret_cast<uint32_t*>(row + n * 8) = pack<T>(out[m][n][2 * r] * scale, out[m][n][2 * r + 1] * scale);
        }
      }
    }
  }
};

// As many tiles as a prefill can have for each KV head: the rows' lengths are only known on the device, but at most one
// tile of each is not full.
template <typename Config>
unsigned max_prefill_tiles(const PagedAttention& a, const AttentionPlan& plan) {
  const int64_t tiles = int64_t{a.num_tokens} * plan.heads_per_kv / Config::kRows + a.num_rows;
  if (tiles > 65535) {
    throw std::invalid_argument("num_tokens: too many for one launch of the prefill attention, got " +
                                std::to_string(a.num_tokens));
  }
  return static_cast<unsigned>(tiles);
}

}  // namespace pagedcore::cuda
