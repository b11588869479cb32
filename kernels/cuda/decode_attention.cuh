// Attention of rows with one query over their paged KV (flash-decoding with work split evenly over the
// multiprocessors).
//
// Work is cut into tiles: 64 tokens of one (row, KV head, group of query heads), an item's tiles in sequence. Every
// thread block takes an equal stretch of all tiles, so the grid depends on the device alone and a captured graph serves
// any lengths. An item that is cut between blocks is put together by whichever of them finishes last, always in the
// order of its tokens, so results repeat bit for bit.
//
// In a tile each of the four warps has 16 tokens of its own, its own softmax state and its own ring of asynchronous
// copies: the main loop has no block-wide barrier. S = K Q^T and O^T = V^T P run on m16n8k16 tensor-core instructions
// with up to eight query heads in n, so the queries that share a KV head cost one read of it (GQA), and a query head
// alone (MHA) wastes only idle tensor cores.
#pragma once

#include "decode_merge.cuh"
#include "decode_schedule.cuh"

namespace pagedcore::cuda {

// kSmall: for devices with 99 KB of shared memory a thread block (compute capability 8.6 and 8.9).
template <typename T, int kHeadDim, int kHeadTiles, bool kSmall>
struct Decode {
  using Layout = TileLayout<kHeadDim>;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kWarpTokens = 16;
  static constexpr int kTileTokens = kWarps * kWarpTokens;
  static constexpr int kHeads = 8 * kHeadTiles;  // query heads worked on together
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kWarpTileBytes = kWarpTokens * Layout::kRowBytes;  // K or V of one warp's tokens
  // As many copies in flight as fit beside kBlocksPerMultiprocessor - 1 other blocks in an H100's 227 KB.
  static constexpr int kStages = (kHeadDim <= 64 ? 4 : kHeadDim <= 128 ? 3 : 2) - (kSmall ? 1 : 0);
  static constexpr int kBlocksPerMultiprocessor = kSmall || kHeadTiles > 1 || kHeadDim > 128 ? 1
                                                  : kHeadDim <= 64                           ? 3
                                                                                             : 2;
  static constexpr int kRingBytes = kStages * kWarps * 2 * kWarpTileBytes;
  static constexpr int kMergePitch = kHeadDim + 4;  // keeps the four heads a warp stores at once in different banks
  static constexpr int kMergeFloats = kWarps * kHeads * kMergePitch;
  static constexpr int kSharedBytes =
      kRingBytes + (kMergeFloats + 2 * kWarps * kHeads) * static_cast<int>(sizeof(float));

  // Workspace: a counter for each thread block, then its two partial results (of the item it begins in the middle of,
  // of the item it leaves unfinished): kHeads maxima, kHeads sums, kHeads x head_dim unnormalized outputs.
  static constexpr int kPartialFloats = kHeads * (kHeadDim + 2);
  static int64_t workspace_bytes(int num_blocks) {
    return int64_t{num_blocks} * (sizeof(int32_t) * 4 + 2 * kPartialFloats * sizeof(float));
  }
};

// A cut costs a round through memory, about as long as reading two tiles.
constexpr int kMinTilesPerBlock = 2;

// Loads tiles ahead of the computation, one warp's 16 tokens at a time.
template <typename Config, typename T>
struct TileLoader {
  TileCursor cursor;
  int remaining;          // tiles of this thread block not yet loaded
  int ids_row, ids_base;  // what `block_id` holds: the blocks of tiles ids_base + lane of ids_row
  int block_id;

  __device__ __forceinline__ void find_blocks(const PagedAttention& a, const AttentionPlan& plan) {
    const int base = cursor.tile & ~(kWarpSize - 1);
    if (ids_row == cursor.row && ids_base == base) return;
    ids_row = cursor.row;
    ids_base = base;
    const int token = (base + static_cast<int>(threadIdx.x % kWarpSize)) * Config::kTileTokens +
                      static_cast<int>(threadIdx.x / kWarpSize) * Config::kWarpTokens;
    block_id =
        token < cursor.length ? a.block_tables[int64_t{cursor.row} * a.table_stride + (token >> plan.block_shift)] : 0;
  }

  __device__ __forceinline__ void load(const PagedAttention& a, const AttentionPlan& plan, int items_per_row,
                                       uint32_t stage) {
    if (remaining == 0) return;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    find_blocks(a, plan);
    const int token = cursor.tile * Config::kTileTokens + warp * Config::kWarpTokens;
    const int block = __shfl_sync(kAllLanes, block_id, cursor.tile - ids_base);
    const int kv_head = cursor.item / plan.head_groups;
    const int64_t offset = (int64_t{block} * a.num_kv_heads + kv_head) * plan.kv_stride +
                           int64_t{token & (a.block_size - 1)} * Config::Layout::kChunks * 8;
    const char* keys = reinterpret_cast<const char*>(static_cast<const T*>(a.k_cache) + offset);
    const char* values = reinterpret_cast<const char*>(static_cast<const T*>(a.v_cache) + offset);
#pragma unroll
    for (int i = 0; i < Config::Layout::kChunks / 2; ++i) {
      const int index = i * kWarpSize + lane;
      const int row = index / Config::Layout::kChunks, chunk = index % Config::Layout::kChunks;
      const uint32_t target = stage + Config::Layout::offset(row, chunk);
      // Slots behind the sequence's end may hold anything, NaN too: they are read as zeros.
      const int valid = token + row < cursor.length ? 16 : 0;
      copy_async(target, keys + index * 16, valid);
      copy_async(target + Config::kWarpTileBytes, values + index * 16, valid);
    }
    if (--remaining > 0) advance<Config::kTileTokens>(a, items_per_row, cursor);
  }
};

// One warp's running softmax and output for the query heads of an item; heads lie along the fragments' columns.
template <typename Config, typename T, int kHeadTiles>
struct WarpState {
  uint32_t q[kHeadTiles][Config::kSteps][2];
  float out[kHeadTiles][Config::kSteps][4];  // [dim, head]
  float maximum[kHeadTiles][2];
  float sum[kHeadTiles][2];

  __device__ __forceinline__ void begin(const T* queries, int num_heads) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
      const int head = n * 8 + lane / 4;
      const T* query = queries + head * Config::kSteps * 16 + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < Config::kSteps; ++k) {
        q[n][k][0] = head < num_heads ? *reinterpret_cast<const uint32_t*>(query + k * 16) : 0u;
        q[n][k][1] = head < num_heads ? *reinterpret_cast<const uint32_t*>(query + k * 16 + 8) : 0u;
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][k][i] = 0.f;
      }
      maximum[n][0] = maximum[n][1] = kNoScore;
      sum[n][0] = sum[n][1] = 0.f;
    }
  }

  // `tokens`: how many of the 16 tokens in `stage` exist.
  __device__ __forceinline__ void add_tile(uint32_t stage, int tokens, float scale_log2) {
    const int lane = threadIdx.x % kWarpSize;
    float scores[kHeadTiles][2][4] = {};  // even and odd steps apart: two shorter chains of dependent products
#pragma unroll
    for (int k = 0; k < Config::kSteps; ++k) {
      uint32_t keys[4];
      load_matrices(keys, stage + Config::Layout::offset(lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < kHeadTiles; ++n) multiply_add<T>(scores[n][k % 2], keys, q[n][k][0], q[n][k][1]);
    }
    uint32_t weights[kHeadTiles][2];
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
      float s[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = lane / 4 + i / 2 * 8;
        s[i] = token < tokens ? scores[n][0][i] + scores[n][1][i] : -INFINITY;
      }
      float correction[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float largest = fmaxf(s[c], s[c + 2]);
#pragma unroll
        for (int offset = 4; offset < kWarpSize; offset *= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
        }
        largest = fmaxf(largest, maximum[n][c]);
        correction[c] = exp2_fast((maximum[n][c] - largest) * scale_log2);
        maximum[n][c] = largest;
        s[c] = exp2_fast((s[c] - largest) * scale_log2);
        s[c + 2] = exp2_fast((s[c + 2] - largest) * scale_log2);
        sum[n][c] = sum[n][c] * correction[c] + (s[c] + s[c + 2]);
      }
      if (__any_sync(kAllLanes, correction[0] != 1.f || correction[1] != 1.f)) {
#pragma unroll
        for (int k = 0; k < Config::kSteps; ++k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[n][k][i] *= correction[i % 2];
        }
      }
      weights[n][0] = transpose_matrix(pack<T>(s[0], s[1]));
      weights[n][1] = transpose_matrix(pack<T>(s[2], s[3]));
    }
#pragma unroll
    for (int k = 0; k < Config::kSteps; ++k) {
      uint32_t values[4];
      load_matrices_transposed(values, stage + Config::kWarpTileBytes +
                                           Config::Layout::offset(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kHeadTiles; ++n) multiply_add<T>(out[n][k], values, weights[n][0], weights[n][1]);
    }
  }

  // Write the state where the block's threads merge it: outputs [warp, head, dim], maxima and sums [warp, head].
  __device__ __forceinline__ void store(float* outputs, float* maxima, float* sums) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int head = n * 8 + lane % 4 * 2 + c;
        float* row = outputs + (warp * Config::kHeads + head) * Config::kMergePitch;
#pragma unroll
        for (int k = 0; k < Config::kSteps; ++k) {
          row[k * 16 + lane / 4] = out[n][k][c];
          row[k * 16 + lane / 4 + 8] = out[n][k][c + 2];
        }
        float total = sum[n][c];
#pragma unroll
        for (int offset = 4; offset < kWarpSize; offset *= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
        if (lane < 4) {
          maxima[warp * Config::kHeads + head] = maximum[n][c];
          sums[warp * Config::kHeads + head] = total;
        }
      }
    }
  }
};

// Zero the outputs of padding: rows without tokens, and tokens behind the last row.
template <typename Config, typename T>
__device__ void zero_padding(const PagedAttention& a) {
  const int width = a.num_heads * Config::kSteps * 2;  // in 16-byte chunks
  const auto zero_token = [&](int token) {
    uint4* out = reinterpret_cast<uint4*>(a.out) + int64_t{token} * width;
    for (int i = threadIdx.x; i < width; i += Config::kThreads) out[i] = uint4{0, 0, 0, 0};
  };
  for (int row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
    if (a.seq_lens[row] > 0) continue;
    for (int token = a.query_start_loc[row]; token < a.query_start_loc[row + 1]; ++token) zero_token(token);
  }
  for (int token = a.query_start_loc[a.num_rows] + blockIdx.x; token < a.num_tokens; token += gridDim.x)
    zero_token(token);
}

// End this block's stretch of an item that the blocks `first` to `last` share: merge the warps' states into `out`, or
// leave them to whichever block arrives last.
template <typename Config, typename T, typename State>
__device__ __forceinline__ void finish_stretch(const PagedAttention& a, State& state, float* merge_space, int first,
                                               int last, int num_heads, float scale_log2, T* out) {
  __shared__ bool is_last_arrival;
  float* maxima = merge_space + Config::kMergeFloats;
  float* sums = maxima + Config::kWarps * Config::kHeads;
  int32_t* counters = static_cast<int32_t*>(a.workspace);
  float* partials = reinterpret_cast<float*>(counters + gridDim.x * 4);
  const bool is_first = first == static_cast<int>(blockIdx.x);
  float* partial =
      first == last ? nullptr : partials + (2 * int64_t{blockIdx.x} + (is_first ? 1 : 0)) * Config::kPartialFloats;
  state.store(merge_space, maxima, sums);
  __syncthreads();
  merge_warps<Config, T>(merge_space, maxima, sums, num_heads, scale_log2, out, partial);
  if (partial != nullptr) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();  // after the barrier it stands for the whole block's writes
      is_last_arrival = atomicAdd(counters + first, 1) == last - first;
      __threadfence();
    }
    __syncthreads();
    if (is_last_arrival) {
      merge_partials<Config, T>(partials, first, last, num_heads, scale_log2, out);
      if (threadIdx.x == 0) counters[first] = 0;
    }
  }
  __syncthreads();
}

template <typename T, int kHeadDim, int kHeadTiles, bool kSmall>
__global__ void __launch_bounds__(128, (Decode<T, kHeadDim, kHeadTiles, kSmall>::kBlocksPerMultiprocessor))
    decode_attention(const __grid_constant__ PagedAttention a, const __grid_constant__ AttentionPlan plan) {
  using Config = Decode<T, kHeadDim, kHeadTiles, kSmall>;
  extern __shared__ __align__(128) char shared[];
  allow_next_kernel();
  float* merge_space = reinterpret_cast<float*>(shared + Config::kRingBytes);
  const int items_per_row = a.num_kv_heads * plan.head_groups;
  const DecodeSchedule schedule = find_schedule<Config::kThreads, Config::kTileTokens>(a, plan, items_per_row);
  const int begin = blockIdx.x * schedule.tiles_per_block;
  const int end = min(begin + schedule.tiles_per_block, schedule.total_tiles);
  TileLoader<Config, T> loader{schedule.first, end - begin, -1, -1, 0};
  if (begin < end) loader.find_blocks(a, plan);
  // Up to here only the arrays of indices were read: they come with the step's input, long before q, k and v.
  wait_for_previous_kernel();
  if (begin < end) {
    const int warp = threadIdx.x / kWarpSize;
    const uint32_t ring = shared_address(shared) + warp * 2 * Config::kWarpTileBytes;
    constexpr uint32_t kStageBytes = Config::kWarps * 2 * Config::kWarpTileBytes;
#pragma unroll
    for (int s = 0; s < Config::kStages; ++s) {
      loader.load(a, plan, items_per_row, ring + s * kStageBytes);
      commit_copies();
    }
    const float scale_log2 = a.scale * kLog2e;
    TileCursor cursor = schedule.first;
    WarpState<Config, T, kHeadTiles> state;
    T* out = nullptr;
    int num_heads = 0;
    bool starts_item = true;
    uint32_t stage = ring;
    for (int tile = begin; tile < end; ++tile) {
      if (starts_item) {
        const int kv_head = cursor.item / plan.head_groups, group = cursor.item % plan.head_groups;
        const int head = kv_head * plan.heads_per_kv + group * Config::kHeads;
        num_heads = min(Config::kHeads, plan.heads_per_kv - group * Config::kHeads);
        out = static_cast<T*>(a.out) + (int64_t{cursor.token} * a.num_heads + head) * kHeadDim;
        state.begin(static_cast<const T*>(a.q) + cursor.token * a.q_row_stride + head * kHeadDim, num_heads);
        starts_item = false;
      }
      wait_for_copies<Config::kStages - 1>();
      __syncwarp();
      const int tokens = cursor.length - cursor.tile * Config::kTileTokens - warp * Config::kWarpTokens;
      if (tokens > 0) state.add_tile(stage, tokens, scale_log2);
      __syncwarp();
      loader.load(a, plan, items_per_row, stage);
      commit_copies();
      stage = stage + kStageBytes == ring + Config::kRingBytes ? ring : stage + kStageBytes;

      const bool ends_item = cursor.tile + 1 == cursor.tiles;
      if (ends_item || tile + 1 == end) {
        const int first_tile = tile - cursor.tile;  // the item's first and last tile in the sequence of all tiles
        const int last_tile = first_tile + cursor.tiles - 1;
        const int first = first_tile / schedule.tiles_per_block, last = last_tile / schedule.tiles_per_block;
        finish_stretch<Config, T>(a, state, merge_space, first, last, num_heads, scale_log2, out);
        starts_item = true;
      }
      if (tile + 1 < end) advance<Config::kTileTokens>(a, items_per_row, cursor);
    }
  }
  if (schedule.has_padding) zero_padding<Config, T>(a);
}

template <typename T, int kHeadDim, int kHeadTiles, bool kSmall>
void launch_decode(const PagedAttention& a, Stream stream) {
  using Config = Decode<T, kHeadDim, kHeadTiles, kSmall>;
  allow_shared_memory<Config::kSharedBytes>(decode_attention<T, kHeadDim, kHeadTiles, kSmall>);
  const int num_blocks = device_info().num_multiprocessors * Config::kBlocksPerMultiprocessor;
  if (a.workspace == nullptr || a.workspace_bytes < Config::workspace_bytes(num_blocks)) {
    throw std::invalid_argument("workspace: attention with " + std::to_string(a.num_heads) + " heads of " +
                                std::to_string(kHeadDim) + " needs " +
                                std::to_string(Config::workspace_bytes(num_blocks)) + " bytes, got " +
                                std::to_string(a.workspace == nullptr ? 0 : a.workspace_bytes));
  }
  AttentionPlan plan = plan_attention(a);
  plan.head_groups = ceil_div(plan.heads_per_kv, Config::kHeads);
  plan.min_tiles = kMinTilesPerBlock;
  launch(decode_attention<T, kHeadDim, kHeadTiles, kSmall>, num_blocks, Config::kThreads, Config::kSharedBytes, stream,
         a, plan);
}

template <typename T, int kHeadDim, int kHeadTiles>
void launch_decode(const PagedAttention& a, Stream stream) {
  if constexpr (kHeadDim >= 128) {
    if (device_info().max_shared_bytes < Decode<T, kHeadDim, kHeadTiles, false>::kSharedBytes) {
      return launch_decode<T, kHeadDim, kHeadTiles, true>(a, stream);
    }
  }
  launch_decode<T, kHeadDim, kHeadTiles, false>(a, stream);
}

template <typename T>
void decode(const PagedAttention& a, Stream stream) {
  dispatch_head_dim(a.head_dim, [&](auto head_dim) {
    if (a.num_heads / a.num_kv_heads <= 8) {
      launch_decode<T, head_dim.value, 1>(a, stream);
    } else {
      launch_decode<T, head_dim.value, 2>(a, stream);
    }
  });
}

}  // namespace pagedcore::cuda
