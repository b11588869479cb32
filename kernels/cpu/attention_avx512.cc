// Attention with AVX-512, and with its bfloat16 products in pairs. attention_generic.cc says what each vector function
// does.
#include "cpu/attention_tile.h"
#include "cpu/vector_avx512.h"

namespace pagedcore::cpu {
namespace {

struct Vector : VectorAvx512 {
  static constexpr int kMaxRows = 6;
  static constexpr int kMaxColumns = 4;

  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static float largest_lane(Reg reg) { return _mm512_reduce_max_ps(reg); }
  static Reg first_lanes(Reg reg, int n, float rest) {
    return _mm512_mask_mov_ps(set1(rest), first(std::clamp(n, 0, kWidth)), reg);
  }
  static void transpose(Reg (&rows)[kWidth]) {
    Reg pairs[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    Reg quads[kWidth];  // quads[4 * i + j], lane group g: element 4 * g + j of the rows 4 * i to 4 * i + 3
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; i += 4) {
      quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Reg even_low = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);
      const Reg odd_low = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
      const Reg even_high = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
      const Reg odd_high = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
      rows[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      rows[4 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      rows[8 + j] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      rows[12 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
  }
};

// A word holds two bfloat16. The weights are rounded to bfloat16 too, as kernels for tensor cores have it.
struct PairMath {
  using Vector = cpu::Vector;
  using Element = BFloat16;
  static constexpr int kElementsPerWord = 2;

  static __m512 load_words(const BFloat16* p, int n) { return _mm512_maskz_loadu_ps(Vector::first(n), p); }
  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static void pack_values(const BFloat16* rows, int head_dim, float* out) {
    for (int row = 0; row < Vector::kWidth; row += 2, rows += 2 * head_dim, out += head_dim) {
      for (int i = 0; i < head_dim; i += 2 * Vector::kWidth)
        interleave(rows + i, rows + head_dim + i, head_dim - i, out + i);
    }
  }
  static void store_weights(float* words, int lane, __m512 weights) {
    const __m256i halves = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weights));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + lane / 2), halves);
  }

 private:
  // The first n (16, or 32 and more) elements of two rows, in pairs.
  static void interleave(const BFloat16* first, const BFloat16* second, int n, float* out) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __mmask16 words = n >= 32 ? 0xffff : 0x00ff;
    const __m512i a = _mm512_maskz_loadu_epi32(words, first);
    const __m512i b = _mm512_maskz_loadu_epi32(words, second);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, low, b));
    if (n >= 32) _mm512_storeu_si512(out + Vector::kWidth, _mm512_permutex2var_epi16(a, high, b));
  }
};

}  // namespace

AttentionKernel attention_kernel_avx512(DType dtype) {
  return float_attention_kernel<Vector, BFloat16, Float16>(dtype);
}

AttentionKernel attention_kernel_avx512_bf16() { return make_attention_kernel<PairMath>(); }

}  // namespace pagedcore::cpu
