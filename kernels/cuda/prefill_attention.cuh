// Causal attention of rows with several queries over their paged KV (FlashAttention-2, Dao 2023, algorithm 1) on
// m16n8k16 tensor-core instructions: for every device and head_dim. On Hopper, prefill_attention_sm90.cuh is faster
// where it applies.
//
// A thread block has 128 (64 for wide heads) consecutive pairs (query, query head of one KV head) of a row, so that
// heads which share a KV head share its loads, and short queries still fill the tile. K and V come through the block
// table into double buffers, a tile ahead.
#pragma once

#include "prefill_tile.cuh"

namespace pagedcore::cuda {

template <typename T, int kHeadDim>
struct Prefill {
  using Layout = TileLayout<kHeadDim>;
  using QueryLayout = Layout;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kHeadDim <= 128 ? 2 : 1;  // m16 tiles of each warp
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kTokens = kHeadDim <= 128 ? 64 : 32;  // of a K or V tile
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kQueryBytes = kRows * Layout::kRowBytes;
  static constexpr int kTileBytes = kTokens * Layout::kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + 4 * kTileBytes;  // two of K, two of V
};

template <typename Config, typename T>
using Scores = float[Config::kRowTiles][PrefillState<Config, T>::kColumns][4];

// s = Q K^T of one warp's rows.
template <typename Config, typename T>
__device__ __forceinline__ void score(Scores<Config, T>& s, uint32_t queries, uint32_t keys) {
  constexpr int kColumns = PrefillState<Config, T>::kColumns;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int m = 0; m < Config::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < Config::kSteps; ++k) {
    uint32_t q[Config::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) {
      const int row = warp * Config::kWarpRows + m * 16 + lane % 16;
      load_matrices(q[m], queries + Config::Layout::offset(row, 2 * k + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t key[4];
      load_matrices(key, keys + Config::Layout::offset(n * 16 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < Config::kRowTiles; ++m) {
        multiply_add<T>(s[m][2 * n], q[m], key[0], key[1]);
        multiply_add<T>(s[m][2 * n + 1], q[m], key[2], key[3]);
      }
    }
  }
}

// out += P V of one warp's rows.
template <typename Config, typename T>
__device__ __forceinline__ void add_values(PrefillState<Config, T>& state, const Scores<Config, T>& s,
                                           uint32_t values) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < Config::kTokens / 16; ++k) {
    uint32_t weights[Config::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) PrefillState<Config, T>::pack_weights(weights[m], s[m], k);
#pragma unroll
    for (int n = 0; n < Config::kSteps; ++n) {
      uint32_t value[4];
      load_matrices_transposed(value, values + Config::Layout::offset(k * 16 + lane % 16, 2 * n + lane / 16));
#pragma unroll
      for (int m = 0; m < Config::kRowTiles; ++m) {
        multiply_add<T>(state.out[m][2 * n], weights[m], value[0], value[1]);
        multiply_add<T>(state.out[m][2 * n + 1], weights[m], value[2], value[3]);
      }
    }
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(128)
    prefill_attention(const __grid_constant__ PagedAttention a, const __grid_constant__ AttentionPlan plan) {
  using Config = Prefill<T, kHeadDim>;
  extern __shared__ __align__(128) char shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  __shared__ TileIndex<Config::kThreads, Config::kRows> index;
  // The last tiles, which see the most context, go first.
  const int wanted = index.build(a, plan) - 1 - static_cast<int>(blockIdx.y);
  if (wanted < 0) return;
  const PrefillTile tile = index.find(a, plan, wanted);
  const int kv_head = blockIdx.x;
  const uint32_t queries = shared_address(shared), keys = queries + Config::kQueryBytes,
                 values = keys + 2 * Config::kTileBytes;
  const TokenTiles tiles = token_tiles<Config>(tile, plan.heads_per_kv);
  KVReader<Config, T> reader(a, plan, tile.row, kv_head);
  reader.find_blocks(0);
  load_queries<Config, T>(a, plan, tile, kv_head, queries, 0, Config::kRows, threadIdx.x, Config::kThreads);
  reader.load(reader.k_cache, 0, keys);
  commit_copies();
  reader.load(reader.v_cache, 0, values);
  commit_copies();
  const float scale_log2 = a.scale * kLog2e;
  PrefillState<Config, T> state;
  state.begin(plan, tile);
  for (int j = 0; j < tiles.end; ++j) {
    const uint32_t current = j % 2 * Config::kTileBytes, next = Config::kTileBytes - current;
    wait_for_copies<1>();  // this tile's keys
    __syncthreads();
    if (j + 1 < tiles.end) {
      reader.find_blocks(j + 1);
      reader.load(reader.k_cache, j + 1, keys + next);
    }
    commit_copies();
    Scores<Config, T> s;
    score<Config, T>(s, queries, keys + current);
    float correction[Config::kRowTiles][2];
    state.weigh(s, j * Config::kTokens, j >= tiles.first_masked, scale_log2, correction);
    state.rescale(correction);
    wait_for_copies<1>();  // this tile's values
    __syncthreads();
    if (j + 1 < tiles.end) reader.load(reader.v_cache, j + 1, values + next);
    commit_copies();
    add_values<Config, T>(state, s, values + current);
  }
  state.store(a, plan, tile, kv_head);
}

template <typename T, int kHeadDim>
void launch_prefill(const PagedAttention& a, Stream stream) {
  using Config = Prefill<T, kHeadDim>;
  allow_shared_memory<Config::kSharedBytes>(prefill_attention<T, kHeadDim>);
  const AttentionPlan plan = plan_attention(a);
  const dim3 grid(a.num_kv_heads, max_prefill_tiles<Config>(a, plan));
  launch(prefill_attention<T, kHeadDim>, grid, Config::kThreads, Config::kSharedBytes, stream, a, plan);
}

}  // namespace pagedcore::cuda
