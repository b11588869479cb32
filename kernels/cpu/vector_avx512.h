// Sixteen floats at a time, with AVX-512 F, BW, VL and DQ, and with BF16 beside them. For files compiled for them only.
#pragma once

// GCC 12 takes the "undefined" operands of its own intrinsics for a mistake of their callers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include "cpu/vector_elements.h"

namespace pagedcore::cpu {
namespace {

struct VectorAvx512 {
  static constexpr int kWidth = 16;
  static constexpr int kMaxRows = 8;  // of a register tile: 8 x 2 accumulators keep both multipliers busy
  using Reg = __m512;

  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

  static Reg set1(float value) { return _mm512_set1_ps(value); }

  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Reg load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Reg load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static Reg load_first(const BFloat16* p, int count) { return widen_bf16(_mm256_maskz_loadu_epi16(first(count), p)); }
  static Reg load_first(const Float16* p, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
  }

  static void store(float* p, Reg reg) { _mm512_storeu_ps(p, reg); }
  static void store(BFloat16* p, Reg reg) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(reg)); }
  static void store(Float16* p, Reg reg) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(reg)); }
  static void store_first(float* p, int count, Reg reg) { _mm512_mask_storeu_ps(p, first(count), reg); }
  static void store_first(BFloat16* p, int count, Reg reg) {
    _mm256_mask_storeu_epi16(p, first(count), narrow_bf16(reg));
  }
  static void store_first(Float16* p, int count, Reg reg) {
    _mm256_mask_storeu_epi16(p, first(count), narrow_f16(reg));
  }

  // Lane i of the low (high) result is the first (second) element of pair i.
  static void load_pairs(const BFloat16* p, Reg* low, Reg* high) {
    const __m512i bits = _mm512_loadu_si512(p);
    *low = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    *high = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
  }

  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  // The bounds come first: where x is NaN, the processor returns its second operand.
  static Reg clamp(Reg x, float low, float high) {
    return _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x));
  }
  static Reg round(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n for integral n.
  static Reg scale(Reg x, Reg n) { return _mm512_scalef_ps(x, n); }
  static float sum(Reg x) { return _mm512_reduce_add_ps(x); }

 private:
  static Reg widen_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // To nearest, ties to even. See vector_elements.h on NaN.
  static __m256i narrow_bf16(Reg reg) {
    const __m512i bits = _mm512_castps_si512(reg);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  static __m256i narrow_f16(Reg reg) { return _mm512_cvtps_ph(reg, _MM_FROUND_TO_NEAREST_INT); }
};

// With AVX512-BF16, which rounds to bfloat16 in one instruction; subnormal numbers become zero.
struct VectorAvx512Bf16 : VectorAvx512 {
  using VectorAvx512::store;
  using VectorAvx512::store_first;

  static void store(BFloat16* p, Reg reg) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(reg)); }
  static void store_first(BFloat16* p, int count, Reg reg) { _mm256_mask_storeu_epi16(p, first(count), narrow(reg)); }

 private:
  static __m256i narrow(Reg reg) { return std::bit_cast<__m256i>(_mm512_cvtneps_pbh(reg)); }
};

}  // namespace
}  // namespace pagedcore::cpu
