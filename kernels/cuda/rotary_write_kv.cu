// Per-head RMSNorm of q and k (Qwen3), rotary position embedding (Su et al. 2021, equation 34) and the write of k and v
// into their slots: one launch, a warp to each head of each token.
#include "common.cuh"

namespace pagedcore::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxHeadDim = 256;
constexpr int kPerLane = kMaxHeadDim / kWarpSize;

template <typename T>
__global__ void __launch_bounds__(kWarps* kWarpSize) rotary_write_kv_kernel(const __grid_constant__ RotaryWriteKV a) {
  __shared__ float heads[kWarps][kMaxHeadDim];
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int token = blockIdx.x, head = blockIdx.y * kWarps + warp;
  const int first_key = a.num_heads, first_value = a.num_heads + a.num_kv_heads;
  if (head >= first_value + a.num_kv_heads) return;
  const int slot = a.slot_mapping[token];
  const bool is_query = head < first_key, is_value = head >= first_value;
  if (is_value && slot < 0) return;

  T* x = static_cast<T*>(a.qkv) + token * a.row_stride + head * a.head_dim;
  T* cached = nullptr;
  if (!is_query && slot >= 0) {
    const int kv_head = head - (is_value ? first_value : first_key);
    const int64_t offset =
        (int64_t{slot / a.block_size} * a.num_kv_heads + kv_head) * a.block_size + slot % a.block_size;
    cached = static_cast<T*>(is_value ? a.v_cache : a.k_cache) + offset * a.head_dim;
  }
  if (is_value) {
    for (int i = lane; i < a.head_dim; i += kWarpSize) cached[i] = x[i];
    return;
  }

  const T* norm = static_cast<const T*>(is_query ? a.q_norm : a.k_norm);
  float values[kPerLane];
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int i = j * kWarpSize + lane;
    values[j] = i < a.head_dim ? to_float(x[i]) : 0.f;
    sum += values[j] * values[j];
  }
  if (norm != nullptr) {
    const float scale = rsqrtf(reduce_warp(sum, Add{}) / a.head_dim + a.norm_eps);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int i = j * kWarpSize + lane;
      if (i < a.head_dim)
        values[j] = to_float(from_float<T>(to_float(norm[i]) * to_float(from_float<T>(values[j] * scale))));
    }
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int i = j * kWarpSize + lane;
    if (i < a.head_dim) heads[warp][i] = values[j];
  }
  __syncwarp();
  const int half = a.cos_sin == nullptr ? 0 : a.rotary_dim / 2;
  const float* angles = a.cos_sin + int64_t{a.positions[token]} * a.rotary_dim;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int i = j * kWarpSize + lane;
    if (i >= a.head_dim) break;
    float rotated = values[j];
    if (i < half) {
      rotated = values[j] * angles[i] - heads[warp][i + half] * angles[half + i];
    } else if (i < 2 * half) {
      rotated = values[j] * angles[i - half] + heads[warp][i - half] * angles[i];
    }
    const T result = from_float<T>(rotated);
    x[i] = result;
    if (cached != nullptr) cached[i] = result;
  }
}

}  // namespace

void rotary_write_kv(const RotaryWriteKV& a, Stream stream) {
  if (a.num_tokens == 0) return;
  if (a.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("head_dim: the CUDA rotary_write_kv supports up to " + std::to_string(kMaxHeadDim) +
                                ", got " + std::to_string(a.head_dim));
  }
  const dim3 grid(a.num_tokens, ceil_div(a.num_heads + 2 * a.num_kv_heads, kWarps));
  dispatch_dtype(a.dtype, [&](auto zero) {
    launch(rotary_write_kv_kernel<decltype(zero)>, grid, kWarps * kWarpSize, 0, stream, a);
  });
}

}  // namespace pagedcore::cuda
