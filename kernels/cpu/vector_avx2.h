// Eight floats at a time, with AVX2, FMA and F16C. For files compiled for them only.
#pragma once

#include <immintrin.h>

#include "cpu/vector_elements.h"

namespace pagedcore::cpu {
namespace {

struct VectorAvx2 {
  static constexpr int kWidth = 8;
  static constexpr int kMaxRows = 6;  // of a register tile: 6 x 2 accumulators in 16 registers
  using Reg = __m256;

  static Reg set1(float value) { return _mm256_set1_ps(value); }

  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Reg load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  template <class T>
  static Reg load_first(const T* p, int count) {
    T buffer[kWidth] = {};
    for (int i = 0; i < count; ++i) buffer[i] = p[i];
    return load(buffer);
  }

  static void store(float* p, Reg reg) { _mm256_storeu_ps(p, reg); }
  // To nearest, ties to even. See vector_elements.h on NaN.
  static void store(BFloat16* p, Reg reg) {
    const __m256i bits = _mm256_castps_si256(reg);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static void store(Float16* p, Reg reg) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reg, _MM_FROUND_TO_NEAREST_INT));
  }
  template <class T>
  static void store_first(T* p, int count, Reg reg) {
    T buffer[kWidth];
    store(buffer, reg);
    for (int i = 0; i < count; ++i) p[i] = buffer[i];
  }

  // Lane i of the low (high) result is the first (second) element of pair i.
  static void load_pairs(const BFloat16* p, Reg* low, Reg* high) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *low = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    *high = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))));
  }

  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  // The bounds come first: where x is NaN, the processor returns its second operand.
  static Reg clamp(Reg x, float low, float high) {
    return _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x));
  }
  static Reg round(Reg x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n for integral n in [-126, 127].
  static Reg scale(Reg x, Reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static float sum(Reg x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace
}  // namespace pagedcore::cpu
