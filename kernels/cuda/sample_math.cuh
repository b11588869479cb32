// Random numbers, exponential and logarithm for sampling: bit for bit those of the CPU kernels (cpu/sample_math.h).
//
// The intrinsics round every operation by itself, so the compiler cannot contract two of them to a fused one.
#pragma once

#include "common.cuh"

namespace pagedcore::cuda {

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float subtract(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3).
__device__ __forceinline__ uint4 philox(uint4 counter, uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    counter = {__umulhi(0xCD9E8D57u, counter.z) ^ counter.y ^ key0, 0xCD9E8D57u * counter.z,
               __umulhi(0xD2511F53u, counter.x) ^ counter.w ^ key1, 0xD2511F53u * counter.x};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// exp(x) for x in [-87, 0].
__device__ __forceinline__ float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;
  const float rounded = add(multiply(x, 1.44269504f), kRound);
  const float n = subtract(rounded, kRound);
  const float r = subtract(subtract(x, multiply(n, 0.693359375f)), multiply(n, -2.12194440e-4f));
  float p = 0.0013836737f;
  p = add(multiply(p, r), 0.0083748987f);
  p = add(multiply(p, r), 0.0416682325f);
  p = add(multiply(p, r), 0.1666641980f);
  p = add(multiply(p, r), 0.4999999106f);
  p = add(multiply(p, r), 1.0f);
  p = add(multiply(p, r), 1.0f);
  const int exponent = __float_as_int(rounded) - __float_as_int(kRound);
  return multiply(p, __int_as_float((exponent + 127) << 23));
}

// log(x) for normal positive x.
__device__ __forceinline__ float log_positive(float x) {
  const int bits = __float_as_int(x);
  const int exponent = (bits - 0x3F3504F3) >> 23;
  const float f = subtract(__int_as_float(bits - (exponent << 23)), 1.0f);
  const float n = static_cast<float>(exponent);
  float p = 0.0873475075f;
  p = subtract(multiply(p, f), 0.1430748254f);
  p = add(multiply(p, f), 0.1491798908f);
  p = subtract(multiply(p, f), 0.1657051444f);
  p = add(multiply(p, f), 0.1996207088f);
  p = subtract(multiply(p, f), 0.2500175536f);
  p = add(multiply(p, f), 0.3333395123f);
  p = subtract(multiply(p, f), 0.4999999106f);
  return add(add(add(multiply(multiply(f, f), p), multiply(n, -2.12194440e-4f)), f), multiply(n, 0.693359375f));
}

// Standard Gumbel variable of 32 random bits.
__device__ __forceinline__ float gumbel(uint32_t bits) {
  const float u = add(multiply(static_cast<float>(static_cast<int>(bits >> 1)), 0x1.FFFFFEp-32f), 0x1p-32f);
  const float complement = subtract(1.0f, u);
  const float lost = subtract(subtract(1.0f, complement), u);
  return -log_positive(subtract(-log_positive(complement), lost));
}

// Integers in the order of the floats they stand for.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
__device__ __forceinline__ float from_ordered(int key) { return __int_as_float(key ^ ((key >> 31) & 0x7FFFFFFF)); }

// A value and its index in one number: the larger value first, of equal ones the lower index. Above 0 for every real
// entry.
__device__ __forceinline__ uint64_t ranked(float value, int index) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(ordered(value)) ^ 0x80000000u) << 32) |
         static_cast<uint32_t>(~index);
}
__device__ __forceinline__ float ranked_value(uint64_t key) {
  return from_ordered(static_cast<int>(static_cast<uint32_t>(key >> 32) ^ 0x80000000u));
}
__device__ __forceinline__ int ranked_index(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

// exp(-distance), also for an infinite one.
__device__ __forceinline__ float weight_of(float distance) { return exp_nonpositive(-fminf(distance, 87.0f)); }

}  // namespace pagedcore::cuda
