// Attention with AVX2, FMA and F16C. attention_generic.cc says what each vector function does.
#include "cpu/attention_tile.h"
#include "cpu/vector_avx2.h"

namespace pagedcore::cpu {
namespace {

struct Vector : VectorAvx2 {
  static constexpr int kMaxRows = 6;
  static constexpr int kMaxColumns = 2;

  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static float largest_lane(Reg reg) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(reg), _mm256_extractf128_ps(reg, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static Reg first_lanes(Reg reg, int n, float rest) {
    const __m256i first = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_blendv_ps(set1(rest), reg, _mm256_castsi256_ps(first));
  }
  static void transpose(Reg (&rows)[kWidth]) {
    Reg pairs[kWidth];
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    Reg quads[kWidth];  // quads[4 * i + j], lane group g: element 4 * g + j of the rows 4 * i to 4 * i + 3
#pragma GCC unroll 2
    for (int i = 0; i < kWidth; i += 4) {
      quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }
};

}  // namespace

AttentionKernel attention_kernel_avx2(DType dtype) { return float_attention_kernel<Vector, BFloat16, Float16>(dtype); }

}  // namespace pagedcore::cpu
