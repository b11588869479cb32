// y = x W^T for up to 32 rows of x. A decode step of a small batch reads every weight once and computes next to nothing
// with it, so what counts is that the memory never rests.
//
// The rows of W are cut into items, dealt out to the thread blocks in turn. One warp copies an item, and x, into a ring
// in shared memory with the tensor copy engine, in few and large pieces: a thread issues one in about a hundred cycles.
// Eight warps multiply on tensor cores (W x^T, 16 rows of W by 8 or 16 rows of x), each taking its part of k, and add
// up their sums in a fixed order. A weight does not depend on the kernels before this one, so the ring is filled while
// those still run.
//
// For gate and up projections an item has pairs of rows, and what is stored is silu(gate) * up.
#include "tensor_copy.cuh"

namespace pagedcore::cuda {
namespace {

constexpr int kTileRows = 16;    // of W: m of mma.m16n8k16, and the rows of a box
constexpr int kBoxColumns = 64;  // along k: 128 bytes, the width of the swizzle
constexpr int kMaxTokens = 32;
constexpr int kRingBytes = 192 << 10;
constexpr int kMaxSharedBytes = 227 << 10;  // of a thread block on the devices that this is made for

template <int kRowTileCount, int kTokenCount>
struct Skinny {
  static constexpr int kRowTiles = kRowTileCount, kTokens = kTokenCount;
  static constexpr int kWarps = 8;  // that multiply
  static constexpr int kThreads = (kWarps + 1) * kWarpSize;
  static constexpr int kGroupTokens = kTokens < 16 ? 8 : 16;  // of one warp
  static constexpr int kGroups = kTokens / kGroupTokens;
  static constexpr int kSlices = kWarps / kGroups;                            // of k
  static constexpr int kBoxes = kRowTiles == 1 ? 8 : kRowTiles == 2 ? 4 : 2;  // along k, to a stage
  static constexpr int kSteps = kBoxes * kBoxColumns / 16;
  static constexpr int kWeightBoxBytes = kTileRows * kBoxColumns * 2, kTokenBoxBytes = kTokens * kBoxColumns * 2;
  static constexpr int kTileBytes = kBoxes * kWeightBoxBytes;
  static constexpr int kWeightBytes = kRowTiles * kTileBytes;
  static constexpr int kStageBytes = kWeightBytes + kBoxes * kTokenBoxBytes;
  static constexpr int kStages = kRingBytes / kStageBytes;
  static constexpr int kSumPitch = kTileRows + 1;
  static constexpr int kSumBytes = kSlices * kTokens * kSumPitch * static_cast<int>(sizeof(float));
  static constexpr int kAlignment = 1024;
  static constexpr int kSharedBytes = kStages * kStageBytes + kSumBytes + kStages * 16 + kAlignment;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

struct SkinnyMaps {
  CUtensorMap weight;
  CUtensorMap x;
};

// How W is cut up. An item is `units` units of rows, the last one maybe fewer; a unit a tile, or the two tiles of a
// gate and its up projection.
template <typename Config, bool kGated>
struct Items {
  static constexpr int kUnitTiles = kGated ? 2 : 1;
  static constexpr int kUnits = Config::kRowTiles / kUnitTiles;
  int num_units;
  int num_items;
  int num_stages;  // of each item

  __device__ __forceinline__ explicit Items(const SkinnyLinear& a)
      : num_units(a.out_features / (kTileRows * kUnitTiles)),
        num_items(ceil_div(num_units, kUnits)),
        num_stages(ceil_div(a.in_features, Config::kBoxes * kBoxColumns)) {}

  __device__ __forceinline__ int tiles(int item) const { return min(kUnits, num_units - item * kUnits) * kUnitTiles; }
};

// The copying thread: stage i % kStages of the ring has the i-th piece of work.
template <typename Config, bool kGated>
struct Copier {
  const SkinnyLinear& a;
  const SkinnyMaps& maps;
  const Items<Config, kGated>& items;
  uint32_t ring, barriers;

  __device__ __forceinline__ uint32_t stage(int i) const { return ring + i % Config::kStages * Config::kStageBytes; }
  __device__ __forceinline__ uint32_t full(int i) const { return barriers + i % Config::kStages * 16; }

  __device__ __forceinline__ void copy_weights(int i, int item, int part) const {
    constexpr int kUnitTiles = Items<Config, kGated>::kUnitTiles;
    const int first = item * Items<Config, kGated>::kUnits, tiles = items.tiles(item);
    barrier_expect(full(i), Config::kBoxes * (tiles * Config::kWeightBoxBytes + Config::kTokenBoxBytes));
#pragma unroll
    for (int tile = 0; tile < Config::kRowTiles; ++tile) {
      if (tile >= tiles) break;
      const int row = (first + tile / kUnitTiles) * kTileRows + tile % kUnitTiles * (a.out_features / 2);
      copy_stack_once(stage(i) + tile * Config::kTileBytes, &maps.weight, part * Config::kBoxes, row, full(i));
    }
  }

  __device__ __forceinline__ void copy_tokens(int i, int part) const {
    copy_stack(stage(i) + Config::kWeightBytes, &maps.x, part * Config::kBoxes, 0, full(i));
  }

  __device__ __forceinline__ void run() const {
    const int ahead = min(items.num_stages, Config::kStages);
    for (int i = 0; i < ahead; ++i) copy_weights(i, blockIdx.x, i);
    wait_for_previous_kernel();
    for (int i = 0; i < ahead; ++i) copy_tokens(i, i);
    int i = ahead, part = ahead;
    for (int item = blockIdx.x; item < items.num_items; item += gridDim.x, part = 0) {
      for (; part < items.num_stages; ++part, ++i) {
        if (i >= Config::kStages) barrier_wait(full(i) + 8, i / Config::kStages - 1);
        copy_weights(i, item, part);
        copy_tokens(i, part);
      }
    }
  }
};

// Where a 16-byte piece of a row of boxes lies, swizzled.
__device__ __forceinline__ uint32_t piece(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// d += one warp's part of a stage: every kSlices-th step along k, for its tokens.
template <typename T, typename Config>
__device__ __forceinline__ void multiply_stage(float (&d)[Config::kRowTiles][Config::kGroupTokens / 8][4],
                                               uint32_t stage, int tiles) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int slice = warp / Config::kGroups, group = warp % Config::kGroups;
#pragma unroll
  for (int i = 0; i < ceil_div(Config::kSteps, Config::kSlices); ++i) {
    const int step = i * Config::kSlices + slice;
    const int box = step / 4, chunk = step % 4 * 2;
    const uint32_t tokens = stage + Config::kWeightBytes + box * Config::kTokenBoxBytes;
    uint32_t b[4];
    if constexpr (Config::kGroupTokens == 16) {
      load_matrices(b, tokens + piece(group * 16 + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
    } else {
      load_two_matrices(b[0], b[1], tokens + piece(lane % 8, chunk + lane / 8 % 2));
    }
#pragma unroll
    for (int tile = 0; tile < Config::kRowTiles; ++tile) {
      if (tile >= tiles) break;
      uint32_t w[4];
      load_matrices(
          w, stage + tile * Config::kTileBytes + box * Config::kWeightBoxBytes + piece(lane % 16, chunk + lane / 16));
#pragma unroll
      for (int n = 0; n < Config::kGroupTokens / 8; ++n) multiply_add<T>(d[tile][n], w, b[2 * n], b[2 * n + 1]);
    }
  }
}

template <typename T>
__device__ __forceinline__ void store(const SkinnyLinear& a, int token, int column, int width, float value) {
  const int64_t at = token * int64_t{width} + column;
  if (a.y_dtype == DType::kFloat32) {
    static_cast<float*>(a.y)[at] = value;
  } else {
    static_cast<T*>(a.y)[at] = from_float<T>(value);
  }
}

// Add up the warps' sums of an item, tile by tile, and store them, or silu(gate) * up of each two tiles.
template <typename T, typename Config, bool kGated>
__device__ __forceinline__ void finish_item(const SkinnyLinear& a,
                                            const float (&d)[Config::kRowTiles][Config::kGroupTokens / 8][4],
                                            float* sums, int first_unit, int tiles) {
  constexpr int kRowTiles = Config::kRowTiles, kTokens = Config::kTokens;
  constexpr int kComputeThreads = Config::kWarps * kWarpSize;
  constexpr int kValues = ceil_div(kTokens * kTileRows, kComputeThreads);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int slice = warp / Config::kGroups, group = warp % Config::kGroups;
  float gate[kValues];
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
    if (tile >= tiles) break;
    named_barrier_sync(1, kComputeThreads);  // the sums of the tile before have been read
#pragma unroll
    for (int n = 0; n < Config::kGroupTokens / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = group * Config::kGroupTokens + n * 8 + lane % 4 * 2 + j % 2;
        sums[(slice * kTokens + token) * Config::kSumPitch + lane / 4 + j / 2 * 8] = d[tile][n][j];
      }
    }
    named_barrier_sync(1, kComputeThreads);
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int i = v * kComputeThreads + threadIdx.x, token = i / kTileRows, row = i % kTileRows;
      if (token >= a.num_tokens) continue;
      float sum = 0.f;
#pragma unroll
      for (int from = 0; from < Config::kSlices; ++from) {
        sum += sums[(from * kTokens + token) * Config::kSumPitch + row];
      }
      if constexpr (kGated) {
        const int column = (first_unit + tile / 2) * kTileRows + row;
        sum = to_float(from_float<T>(sum));  // rounded at each step, as where these are operations of their own
        if (tile % 2 == 0) {
          gate[v] = sum;
        } else {
          const float activated = gate[v] / (1.f + exp2_fast(-1.4426950408889634f * gate[v]));
          store<T>(a, token, column, a.out_features / 2, to_float(from_float<T>(activated)) * sum);
        }
      } else {
        const int column = (first_unit + tile) * kTileRows + row;
        if (a.bias != nullptr) sum += to_float(static_cast<const T*>(a.bias)[column]);
        store<T>(a, token, column, a.out_features, sum);
      }
    }
  }
}

template <typename T, int kRowTiles, int kTokens, bool kGated>
__global__ void __launch_bounds__(Skinny<kRowTiles, kTokens>::kThreads, 1)
    skinny_linear_kernel(const __grid_constant__ SkinnyLinear a, const __grid_constant__ SkinnyMaps maps) {
#if __CUDA_ARCH__ >= 900
  using Config = Skinny<kRowTiles, kTokens>;
  extern __shared__ char shared[];
  allow_next_kernel();  // it waits for this one's end before it touches what this one writes
  const uint32_t begin = shared_address(shared);
  const uint32_t ring = (begin + Config::kAlignment - 1) / Config::kAlignment * Config::kAlignment;
  float* sums = reinterpret_cast<float*>(shared + (ring - begin) + Config::kStages * Config::kStageBytes);
  const uint32_t barriers = shared_address(sums) + Config::kSumBytes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      barrier_init(barriers + i * 16, 1);
      barrier_init(barriers + i * 16 + 8, Config::kWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  const Items<Config, kGated> items(a);
  if (threadIdx.x / kWarpSize == Config::kWarps) {
    if (threadIdx.x % kWarpSize == 0) Copier<Config, kGated>{a, maps, items, ring, barriers}.run();
    return;
  }
  wait_for_previous_kernel();
  int turn = 0;
  for (int item = blockIdx.x; item < items.num_items; item += gridDim.x) {
    const int tiles = items.tiles(item);
    float d[kRowTiles][Config::kGroupTokens / 8][4] = {};
    for (int i = 0; i < items.num_stages; ++i, ++turn) {
      const int at = turn % Config::kStages;
      barrier_wait(barriers + at * 16, turn / Config::kStages);
      multiply_stage<T, Config>(d, ring + at * Config::kStageBytes, tiles);
      __syncwarp();
      if (threadIdx.x % kWarpSize == 0) barrier_arrive(barriers + at * 16 + 8);
    }
    finish_item<T, Config, kGated>(a, d, sums, item * Items<Config, kGated>::kUnits, tiles);
  }
#endif
}

template <typename T, int kRowTiles, int kTokens, bool kGated>
void launch_shape(const SkinnyLinear& a, Stream stream) {
  using Config = Skinny<kRowTiles, kTokens>;
  const auto kernel = skinny_linear_kernel<T, kRowTiles, kTokens, kGated>;
  allow_shared_memory<Config::kSharedBytes>(kernel);
  const SkinnyMaps maps{
      make_stack_map(a.weight, a.out_features, a.in_features, a.in_features, kTileRows, Config::kBoxes),
      make_stack_map(a.x, a.num_tokens, a.in_features, a.x_row_stride, kTokens, Config::kBoxes)};
  const int num_items = ceil_div(a.out_features, kTileRows * kRowTiles);
  launch(kernel, min(num_items, device_info().num_multiprocessors), Config::kThreads, Config::kSharedBytes, stream, a,
         maps);
}

template <typename T, int kTokens>
void launch_tokens(const SkinnyLinear& a, Stream stream) {
  if (a.is_gated) return launch_shape<T, 2, kTokens, true>(a, stream);
  // One item to a thread block where that is large enough; small ones where there are many, for an even end.
  const int tiles = ceil_div(a.out_features / kTileRows, device_info().num_multiprocessors);
  switch (tiles) {
    case 1:
      return launch_shape<T, 1, kTokens, false>(a, stream);
    case 3:
      return launch_shape<T, 3, kTokens, false>(a, stream);
    default:
      return tiles == 4 || tiles >= 16 ? launch_shape<T, 4, kTokens, false>(a, stream)
                                       : launch_shape<T, 2, kTokens, false>(a, stream);
  }
}

template <typename T>
void launch_dtype(const SkinnyLinear& a, Stream stream) {
  if (a.num_tokens <= 8) return launch_tokens<T, 8>(a, stream);
  return a.num_tokens <= 16 ? launch_tokens<T, 16>(a, stream) : launch_tokens<T, 32>(a, stream);
}

void require(bool condition, const char* field, const char* rule, int64_t value) {
  if (!condition) {
    throw std::invalid_argument("skinny_linear: " + std::string(field) + " must be " + rule + ", got " +
                                std::to_string(value));
  }
}

}  // namespace

bool has_skinny_linear() {
  return device_info().has_dependent_launch && device_info().max_shared_bytes >= kMaxSharedBytes;
}

void skinny_linear(const SkinnyLinear& a, Stream stream) {
  if (a.num_tokens == 0) return;
  require(has_skinny_linear(), "shared memory of a thread block", "227 KB, with code built for 9.0 or higher",
          device_info().max_shared_bytes);
  require(a.num_tokens <= kMaxTokens, "the number of rows", "at most 32", a.num_tokens);
  require(a.in_features % kBoxColumns == 0, "in_features", "a multiple of 64", a.in_features);
  require(a.x_row_stride % 8 == 0, "the distance of x's rows", "a multiple of 8", a.x_row_stride);
  require(reinterpret_cast<uintptr_t>(a.x) % 16 == 0, "x's address", "a multiple of 16",
          reinterpret_cast<intptr_t>(a.x));
  require(a.out_features % (a.is_gated ? 2 * kTileRows : kTileRows) == 0, "out_features",
          "a multiple of 16, or of 32 with gates", a.out_features);
  require(!a.is_gated || (a.bias == nullptr && a.y_dtype == a.dtype), "bias and dtype of y", "none and x's with gates",
          0);
  switch (a.dtype) {
    case DType::kBFloat16:
      return launch_dtype<__nv_bfloat16>(a, stream);
    case DType::kFloat16:
      return launch_dtype<__half>(a, stream);
    case DType::kFloat32:
      break;
  }
  throw std::invalid_argument("dtype: skinny_linear supports bfloat16 and float16");
}

}  // namespace pagedcore::cuda
