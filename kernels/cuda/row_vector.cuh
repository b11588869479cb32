// What the kernels over rows share: rows in pieces of eight elements, and sums over a thread block.
#pragma once

#include "common.cuh"

namespace pagedcore::cuda {

constexpr int kVector = 8;  // elements a thread holds at a time

template <typename T>
struct alignas(sizeof(T) * kVector) Vector {
  T values[kVector];
};

// Both become their sum, rounded to T.
template <typename T>
__device__ __forceinline__ void add_to_residual(Vector<T>& x, Vector<T>& residual) {
  const Vector<T> before = residual;
#pragma unroll
  for (int i = 0; i < kVector; ++i) x.values[i] = from_float<T>(to_float(x.values[i]) + to_float(before.values[i]));
  residual = x;
}

// A thread block of this many threads normalizes rows of up to kMaxVectors vectors to a thread.
constexpr int kMaxVectors = 4;
constexpr int kMaxNormThreads = 512;

// Sum over all threads of the block, in each of them. `warp_sums` is used by this call alone.
__device__ __forceinline__ float reduce_block(float value, float (&warp_sums)[kWarpSize]) {
  value = reduce_warp(value, Add{});
  if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  return reduce_warp(lane < static_cast<int>(blockDim.x) / kWarpSize ? warp_sums[lane] : 0.f, Add{});
}

// The number of threads that normalize a row. Throws where `operation` cannot take rows of this size.
inline int norm_threads(const char* operation, int hidden_size) {
  const int row_vectors = hidden_size / kVector;
  if (hidden_size % kVector != 0 || row_vectors > kMaxVectors * kMaxNormThreads) {
    throw std::invalid_argument(
        "hidden_size: the CUDA " + std::string(operation) + " needs a multiple of " + std::to_string(kVector) +
        " up to " + std::to_string(kVector * kMaxVectors * kMaxNormThreads) + ", got " + std::to_string(hidden_size));
  }
  return min(ceil_div(row_vectors, kWarpSize) * kWarpSize, kMaxNormThreads);
}

}  // namespace pagedcore::cuda
