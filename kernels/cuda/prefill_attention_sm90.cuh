// The prefill attention for Hopper's warpgroup matrix instructions and bulk tensor copies (compute capability 9.0;
// head_dim 64 and 128), after FlashAttention-3 (Shah et al. 2024, algorithm 2).
//
// A thread block to a multiprocessor works through tiles of 128 rows. Two warpgroups have 64 rows each, with their
// queries in registers; a warp of a third one copies K and V, tiles ahead, those of the next rows too. The two take
// turns at the tensor cores: while one has its products made, with the keys of the next tile and the values of this
// one, the other works on its softmax.
#pragma once

#include "prefill_tile.cuh"
#include "tensor_copy.cuh"
#include "wgmma.cuh"

namespace pagedcore::cuda {

template <typename T, int kHeadDim>
struct PrefillSm90 {
  static constexpr int kWarps = 8;  // that compute
  static constexpr int kComputeThreads = kWarps * kWarpSize;
  static constexpr int kThreads = kComputeThreads + 128;
  static constexpr int kRowTiles = 1;
  static constexpr int kWarpRows = 16;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kTokens = 128;
  static constexpr int kBoxRows = 16;  // tokens of a copy: the smallest block
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kStages = 3;
  static constexpr int kCopyRegisters = 40, kComputeRegisters = 232;
  using Layout = WgmmaLayout<kHeadDim, kTokens>;
  using QueryLayout = WgmmaLayout<kHeadDim, kRows>;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kTileBytes = kTokens * kHeadDim * 2;
  static constexpr int kAlignment = 1024;
  static constexpr int kBarrierBytes = 2 * kStages * 8;
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kTileBytes + kBarrierBytes + kAlignment;
};

struct KVMaps {
  CUtensorMap keys;
  CUtensorMap values;
};

// The ring of tiles in shared memory: K, then V of each stage; a stage is full when its copies have arrived, and empty
// when all warps have used it.
template <typename Config>
struct TileRing {
  uint32_t first;
  uint32_t barriers;

  __device__ __forceinline__ uint32_t keys(int j) const { return first + j % Config::kStages * 2 * Config::kTileBytes; }
  __device__ __forceinline__ uint32_t values(int j) const { return keys(j) + Config::kTileBytes; }
  __device__ __forceinline__ uint32_t full(int j) const { return barriers + j % Config::kStages * 16; }
  __device__ __forceinline__ uint32_t empty(int j) const { return full(j) + 8; }
  __device__ __forceinline__ static int round(int j) { return j / Config::kStages; }

  __device__ __forceinline__ void init() const {
    for (int j = 0; j < Config::kStages; ++j) {
      barrier_init(full(j), 1);
      barrier_init(empty(j), Config::kWarps);
    }
    publish_barriers();
  }
};

// The pairs (tile of rows, KV head), those that see the most context first, dealt out to the thread blocks in rounds:
// in one from the first block to the last, in the next back, so that a long tile is followed by a short one. Each two
// rounds begin elsewhere, lest the blocks fall into step with rows of one length.
template <typename Config>
struct WorkList {
  const TileIndex<Config::kThreads, Config::kRows>& index;
  int num_tiles;
  int num_kv_heads;

  __device__ __forceinline__ int pair(int round) const {
    const int num_blocks = gridDim.x;
    const int place = (blockIdx.x + round / 2 * (num_blocks * 5 / 8)) % num_blocks;
    return round * num_blocks + (round % 2 == 0 ? place : num_blocks - 1 - place);
  }
  __device__ __forceinline__ bool has(int round) const { return pair(round) < num_tiles * num_kv_heads; }
  __device__ __forceinline__ PrefillTile tile(const PagedAttention& a, const AttentionPlan& plan, int round) const {
    return index.find(a, plan, num_tiles - 1 - pair(round) / num_kv_heads);
  }
  __device__ __forceinline__ int kv_head(int round) const { return pair(round) % num_kv_heads; }
};

// One warp copies all K and V; a lane has 16 tokens of a tile.
template <typename Config>
__device__ __forceinline__ void copy_tiles(const PagedAttention& a, const AttentionPlan& plan, const KVMaps& maps,
                                           const WorkList<Config>& list, const TileRing<Config>& ring) {
  const int lane = threadIdx.x % kWarpSize;
  int turn = 0;  // counts tiles over all the work
  for (int round = 0; list.has(round); ++round) {
    const PrefillTile tile = list.tile(a, plan, round);
    const int num_tiles = token_tiles<Config>(tile, plan.heads_per_kv).end;
    const int length = a.seq_lens[tile.row], kv_head = list.kv_head(round);
    const int32_t* table = a.block_tables + int64_t{tile.row} * a.table_stride;
    for (int j = 0; j < num_tiles; ++j, ++turn) {
      const int token = j * Config::kTokens + lane * Config::kBoxRows;
      const bool exists = lane < Config::kTokens / Config::kBoxRows && token < length;
      const int block = exists ? table[token >> plan.block_shift] : 0;
      if (turn >= Config::kStages) barrier_wait(ring.empty(turn), ring.round(turn) - 1);
      const int boxes = __popc(__ballot_sync(kAllLanes, exists));
      if (lane == 0) barrier_expect(ring.full(turn), boxes * 2 * Config::kBoxRows * Config::kSteps * 32);
      __syncwarp();
      if (!exists) continue;
      const int row = (block * a.num_kv_heads + kv_head) * a.block_size + (token & (a.block_size - 1));
#pragma unroll
      for (int column = 0; column < Config::kSteps / 4; ++column) {
        const uint32_t offset = column * Config::Layout::kColumnBytes + lane * Config::kBoxRows * 128;
        copy_box(ring.keys(turn) + offset, &maps.keys, column * 64, row, ring.full(turn));
        copy_box(ring.values(turn) + offset, &maps.values, column * 64, row, ring.full(turn));
      }
    }
  }
}

template <typename Config, typename T>
using Sm90Scores = float[1][PrefillState<Config, T>::kColumns][4];

// Start s = Q K^T of one warpgroup's rows.
template <typename Config, typename T>
__device__ __forceinline__ void start_score(Sm90Scores<Config, T>& s, const uint32_t (&q)[Config::kSteps][4],
                                            uint32_t keys) {
  const uint64_t descriptor = matrix_descriptor(keys, 0);
#pragma unroll
  for (int k = 0; k < Config::kSteps; ++k) {
    const int offset = k / 4 * Config::Layout::kColumnBytes + k % 4 * 32;
    wgmma<T, 0>(s[0], q[k], descriptor + offset / 16, k > 0);
  }
  wgmma_commit();
}

// Start out += P V of one warpgroup's rows.
template <typename Config, typename T>
__device__ __forceinline__ void start_add_values(PrefillState<Config, T>& state,
                                                 const uint32_t (&weights)[Config::kTokens / 16][4], uint32_t values) {
  const uint64_t descriptor = matrix_descriptor(values, Config::Layout::kColumnBytes);
#pragma unroll
  for (int k = 0; k < Config::kTokens / 16; ++k) {
    wgmma<T, 1>(state.out[0], weights[k], descriptor + k * 16 * 128 / 16, 1);
  }
  wgmma_commit();
}

// Zero the values behind the sequence's end: those slots may hold anything, NaN too. Both warpgroups do all of it, each
// for itself.
template <typename Config>
__device__ __forceinline__ void zero_values(uint32_t values, int first_row, int group) {
  constexpr int kChunks = Config::Layout::kChunks;
  for (int i = first_row * kChunks + threadIdx.x % 128; i < Config::kTokens * kChunks; i += 128) {
    const uint32_t target = values + Config::Layout::offset(i / kChunks, i % kChunks);
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(target), "r"(0) : "memory");
  }
  publish_to_wgmma();
  named_barrier_sync(3 + group, 128);
}

template <typename Config, typename T>
__device__ __forceinline__ void pack_all_weights(uint32_t (&weights)[Config::kTokens / 16][4],
                                                 const Sm90Scores<Config, T>& s) {
#pragma unroll
  for (int k = 0; k < Config::kTokens / 16; ++k) PrefillState<Config, T>::pack_weights(weights[k], s[0], k);
}

// One warpgroup's part of all the work.
template <typename Config, typename T>
__device__ __forceinline__ void attend(const PagedAttention& a, const AttentionPlan& plan, const WorkList<Config>& list,
                                       uint32_t queries, const TileRing<Config>& ring) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, group = warp / 4;
  const auto synchronize = [&] { named_barrier_sync(3 + group, 128); };
  const auto take_turn = [&] { named_barrier_sync(1 + group, Config::kComputeThreads); };
  const auto give_turn = [&] { named_barrier_arrive(2 - group, Config::kComputeThreads); };
  const auto start_queries = [&](const PrefillTile& tile, int kv_head) {
    load_queries<Config, T>(a, plan, tile, kv_head, queries, group * 64, 64, threadIdx.x % 128, 128);
  };
  const float scale_log2 = a.scale * kLog2e;
  if (!list.has(0)) return;
  PrefillTile tile = list.tile(a, plan, 0);
  start_queries(tile, list.kv_head(0));
  if (group == 1) give_turn();
  int turn = 0;  // counts tiles over all the work
  for (int round = 0;; ++round) {
    wait_for_copies<0>();
    synchronize();
    uint32_t q[Config::kSteps][4];
#pragma unroll
    for (int k = 0; k < Config::kSteps; ++k) {
      const int row = warp * Config::kWarpRows + lane % 16;
      load_matrices(q[k], queries + Config::QueryLayout::offset(row, 2 * k + lane / 16));
    }
    synchronize();
    const bool has_next = list.has(round + 1);
    const PrefillTile next_tile = has_next ? list.tile(a, plan, round + 1) : tile;
    if (has_next) start_queries(next_tile, list.kv_head(round + 1));

    const TokenTiles tiles = token_tiles<Config>(tile, plan.heads_per_kv);
    const int last = tiles.end - 1;
    PrefillState<Config, T> state;
    state.begin(plan, tile);
    Sm90Scores<Config, T> s;
    float correction[1][2];
    barrier_wait(ring.full(turn), ring.round(turn));
    take_turn();
    wgmma_begin();
    start_score<Config, T>(s, q, ring.keys(turn));
    if (group == 0 || last > 0 || has_next) give_turn();  // no turn is given that is not taken
    wgmma_wait<0>();
    state.weigh(s, 0, tiles.first_masked == 0, scale_log2, correction);
    uint32_t weights[Config::kTokens / 16][4];
    for (int j = 0; j < last; ++j, ++turn) {
      pack_all_weights<Config, T>(weights, s);
      barrier_wait(ring.full(turn + 1), ring.round(turn + 1));
      take_turn();
      wgmma_begin();
      start_score<Config, T>(s, q, ring.keys(turn + 1));
      start_add_values<Config, T>(state, weights, ring.values(turn));
      if (group == 0 || j + 1 < last || has_next) give_turn();
      wgmma_wait<1>();
      state.weigh(s, (j + 1) * Config::kTokens, j + 1 >= tiles.first_masked, scale_log2, correction);
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(ring.empty(turn));
      state.rescale(correction);
    }
    pack_all_weights<Config, T>(weights, s);
    const int length = a.seq_lens[tile.row] - last * Config::kTokens;
    if (length < Config::kTokens) zero_values<Config>(ring.values(turn), length, group);
    wgmma_begin();
    start_add_values<Config, T>(state, weights, ring.values(turn));
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(ring.empty(turn));
    ++turn;
    state.store(a, plan, tile, list.kv_head(round));
    if (!has_next) return;
    tile = next_tile;
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(384, 1)
    prefill_attention_sm90(const __grid_constant__ PagedAttention a, const __grid_constant__ AttentionPlan plan,
                           const __grid_constant__ KVMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Config = PrefillSm90<T, kHeadDim>;
  extern __shared__ char shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  __shared__ TileIndex<Config::kThreads, Config::kRows> index;
  const WorkList<Config> list{index, index.build(a, plan), a.num_kv_heads};
  const uint32_t queries = (shared_address(shared) + Config::kAlignment - 1) / Config::kAlignment * Config::kAlignment;
  const TileRing<Config> ring{queries + Config::kQueryBytes,
                              queries + Config::kQueryBytes + Config::kStages * 2 * Config::kTileBytes};
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  if (threadIdx.x >= Config::kComputeThreads) {
    give_registers<Config::kCopyRegisters>();
    if (threadIdx.x / kWarpSize == Config::kWarps) {
      copy_tiles<Config>(a, plan, maps, list, ring);
    }
  } else {
    take_registers<Config::kComputeRegisters>();
    attend<Config, T>(a, plan, list, queries, ring);
  }
#endif
}

// Whether this device runs it: in code built for anything but 90a the kernel is empty, without shared memory.
template <typename T, int kHeadDim>
bool has_prefill_sm90() {
  static const bool has = [] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, prefill_attention_sm90<T, kHeadDim>), "cudaFuncGetAttributes");
    return attributes.sharedSizeBytes > 0;
  }();
  return has;
}

template <typename T, int kHeadDim>
void launch_prefill_sm90(const PagedAttention& a, Stream stream) {
  using Config = PrefillSm90<T, kHeadDim>;
  allow_shared_memory<Config::kSharedBytes>(prefill_attention_sm90<T, kHeadDim>);
  const AttentionPlan plan = plan_attention(a);
  const KVMaps maps{make_tensor_map(a.k_cache, kHeadDim, Config::kBoxRows),
                    make_tensor_map(a.v_cache, kHeadDim, Config::kBoxRows)};
  const unsigned work = a.num_kv_heads * max_prefill_tiles<Config>(a, plan);
  const unsigned num_blocks = min(work, static_cast<unsigned>(device_info().num_multiprocessors));
  launch(prefill_attention_sm90<T, kHeadDim>, num_blocks, Config::kThreads, Config::kSharedBytes, stream, a, plan,
         maps);
}

}  // namespace pagedcore::cuda
