// Attention in plain C++. Also says what attention needs of a vector type beside what vector_*.h has.
#include "cpu/attention_tile.h"
#include "cpu/vector_generic.h"

namespace pagedcore::cpu {
namespace {

struct Vector : VectorGeneric {
  static constexpr int kMaxRows = 2;  // of a product in registers
  static constexpr int kMaxColumns = 2;

  static Reg sub(Reg a, Reg b) { return a - b; }
  // The larger one; b where a is NaN.
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static float largest_lane(Reg reg) {
    float largest = reg[0];
    for (int i = 1; i < kWidth; ++i) largest = std::max(largest, reg[i]);
    return largest;
  }
  // The first n lanes of reg, `rest` in the others; n may be negative or larger than kWidth.
  static Reg first_lanes(Reg reg, int n, float rest) {
    for (int i = std::max(n, 0); i < kWidth; ++i) reg[i] = rest;
    return reg;
  }
  static void transpose(Reg (&rows)[kWidth]) {
    for (int i = 0; i < kWidth; ++i) {
      for (int j = 0; j < i; ++j) {
        const float lane = rows[i][j];
        rows[i][j] = rows[j][i];
        rows[j][i] = lane;
      }
    }
  }
};

}  // namespace

AttentionKernel attention_kernel_generic(DType dtype) {
  return float_attention_kernel<Vector, BFloat16, Float16>(dtype);
}

}  // namespace pagedcore::cpu
