// y = x W^T for up to 16 rows of x. A decode step of a small batch reads every weight once and computes next to nothing
// with it, so what counts is how many bytes are under way at any time.
//
// The product is W x^T on tensor cores, with 16 rows of W to a tile and 8 rows of x to its other side. A dot product
// may be summed in any order, so k is permuted such that what a thread holds of an operand lies side by side: 16 bytes
// a load, for W and x alike, and neither goes through shared memory. The warps of a thread block take turns along k and
// add up their sums in a fixed order at the end.
//
// A weight does not depend on the kernel before this one: the first loads are under way before that one has ended.
#include "common.cuh"

namespace pagedcore::cuda {
namespace {

constexpr int kTileRows = 16;   // of W: m of mma.m16n8k16
constexpr int kTileTokens = 8;  // of x: n
constexpr int kChunk = 32;      // along k: two products' worth, 8 elements a thread
constexpr int kInFlight = 4;    // chunks a warp loads ahead
constexpr int kMaxTokens = 16;

__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

template <typename T, typename Out, int kRowTiles, int kTokenTiles, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize) skinny_linear_kernel(const __grid_constant__ SkinnyLinear a) {
  __shared__ float sums[kWarps][kTokenTiles * kTileTokens][kRowTiles * kTileRows + 1];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = lane / 4, member = lane % 4;  // of the operands' fragments: a row, and a part of k
  const int first_row = blockIdx.x * kRowTiles * kTileRows;
  const int num_chunks = a.in_features / kChunk;
  const T* weight = static_cast<const T*>(a.weight) + int64_t{first_row + group} * a.in_features + member * 8;
  const T* x = static_cast<const T*>(a.x) + member * 8;

  uint4 w[kInFlight][kRowTiles][2];
  const auto load_weights = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = chunk + i * kWarps;
      if (at >= num_chunks) continue;
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = tile * kTileRows + half * 8;
          w[i][tile][half] = load_once(weight + row * a.in_features + int64_t{at} * kChunk);
        }
      }
    }
  };

  load_weights(warp);
  wait_for_previous_kernel();
  allow_next_kernel();

  float d[kRowTiles][kTokenTiles][4] = {};
  for (int chunk = warp; chunk < num_chunks; chunk += kInFlight * kWarps) {
    if (chunk != warp) load_weights(chunk);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = chunk + i * kWarps;
      if (at >= num_chunks) continue;
#pragma unroll
      for (int tokens = 0; tokens < kTokenTiles; ++tokens) {
        const int token = tokens * kTileTokens + group;
        uint4 b = {0, 0, 0, 0};
        if (token < a.num_tokens) {
          b = *reinterpret_cast<const uint4*>(x + token * a.x_row_stride + int64_t{at} * kChunk);
        }
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          const uint4 top = w[i][tile][0], bottom = w[i][tile][1];
          const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
          const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
          multiply_add<T>(d[tile][tokens], first, b.x, b.y);
          multiply_add<T>(d[tile][tokens], second, b.z, b.w);
        }
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int tokens = 0; tokens < kTokenTiles; ++tokens) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = tokens * kTileTokens + member * 2 + j % 2;
        sums[warp][token][tile * kTileRows + group + j / 2 * 8] = d[tile][tokens][j];
      }
    }
  }
  __syncthreads();
  constexpr int kBlockRows = kRowTiles * kTileRows;
  for (int i = threadIdx.x; i < a.num_tokens * kBlockRows; i += kWarps * kWarpSize) {
    const int token = i / kBlockRows, row = i % kBlockRows;
    float sum = 0.f;
#pragma unroll
    for (int from = 0; from < kWarps; ++from) sum += sums[from][token][row];
    if (a.bias != nullptr) sum += to_float(static_cast<const T*>(a.bias)[first_row + row]);
    static_cast<Out*>(a.y)[token * int64_t{a.out_features} + first_row + row] = from_float<Out>(sum);
  }
}

template <typename T, typename Out, int kRowTiles, int kTokenTiles, int kWarps>
void launch_shape(const SkinnyLinear& a, Stream stream) {
  launch(skinny_linear_kernel<T, Out, kRowTiles, kTokenTiles, kWarps>, a.out_features / (kRowTiles * kTileRows),
         kWarps * kWarpSize, 0, stream, a);
}

template <typename T, typename Out>
void launch_output(const SkinnyLinear& a, Stream stream) {
  // Narrow layers make few thread blocks: more warps in each keep as many bytes under way.
  const bool is_narrow = a.out_features < 2 * kTileRows * device_info().num_multiprocessors;
  if (a.num_tokens > kTileTokens) {
    // Two tiles share what is loaded of x, where that leaves enough thread blocks.
    if (!is_narrow && a.out_features % (2 * kTileRows) == 0) return launch_shape<T, Out, 2, 2, 8>(a, stream);
    return is_narrow ? launch_shape<T, Out, 1, 2, 16>(a, stream) : launch_shape<T, Out, 1, 2, 8>(a, stream);
  }
  return is_narrow ? launch_shape<T, Out, 1, 1, 16>(a, stream) : launch_shape<T, Out, 1, 1, 8>(a, stream);
}

template <typename T>
void launch_dtype(const SkinnyLinear& a, Stream stream) {
  return a.y_dtype == DType::kFloat32 ? launch_output<T, float>(a, stream) : launch_output<T, T>(a, stream);
}

}  // namespace

void skinny_linear(const SkinnyLinear& a, Stream stream) {
  if (a.num_tokens == 0) return;
  if (a.num_tokens > kMaxTokens || a.in_features % kChunk != 0 || a.out_features % kTileRows != 0 ||
      a.x_row_stride % 8 != 0) {
    throw std::invalid_argument(
        "skinny_linear: takes up to " + std::to_string(kMaxTokens) + " rows, in_features a multiple of " +
        std::to_string(kChunk) + ", out_features of " + std::to_string(kTileRows) + " and x's rows of 16 bytes, got " +
        std::to_string(a.num_tokens) + " rows " + std::to_string(a.x_row_stride) + " elements apart, " +
        std::to_string(a.in_features) + " and " + std::to_string(a.out_features));
  }
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
