#ifdef __x86_64__

#include <cstring>

#include "cpu/linear_tile.h"
#include "cpu/vector_avx512.h"

namespace pagedcore::cpu {
namespace {

// vdpbf16ps: two products added to each lane; subnormal inputs and sums count as zero.
struct DotPairStep {
  using Vector = VectorAvx512Bf16;
  using Element = BFloat16;
  static constexpr int kGroup = 2;

  template <int Rows, int Registers>
  static void run(const BFloat16* x, int64_t x_stride, const BFloat16* w, __m512 (&sums)[Rows][Registers]) {
    __m512bh weights[Registers];
    for (int c = 0; c < Registers; ++c) weights[c] = std::bit_cast<__m512bh>(_mm512_loadu_si512(w + c * 32));
    for (int r = 0; r < Rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * x_stride, sizeof(pair));
      const auto input = std::bit_cast<__m512bh>(_mm512_set1_epi32(pair));
      for (int c = 0; c < Registers; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], input, weights[c]);
    }
  }
};

}  // namespace

void linear_avx512(const PackedLinear& op, const LinearTask& task) {
  run_linear<VectorAvx512, WidenPairStep<VectorAvx512>, 2>(op, task);
}

void linear_avx512_bf16(const PackedLinear& op, const LinearTask& task) {
  run_linear<VectorAvx512Bf16, DotPairStep, 2>(op, task);
}

}  // namespace pagedcore::cpu

#endif
