#include "cpu/activation.h"

#include <algorithm>

#include "cpu/activation_rows.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"
#include "cpu/vector_generic.h"

namespace pagedcore::cpu {
namespace {

constexpr int64_t kMinPieceElements = 8 << 10;  // worth handing to another thread

SiluAndMulFunction silu_and_mul_function() {
#ifdef __x86_64__
  if (isa() >= Isa::kAvx512Bf16) return silu_and_mul_avx512_bf16;
  if (isa() >= Isa::kAvx512) return silu_and_mul_avx512;
  if (isa() >= Isa::kAvx2) return silu_and_mul_avx2;
#endif
  return run_silu_and_mul<VectorGeneric>;
}

ReluFunction relu_function() {
#ifdef __x86_64__
  if (isa() >= Isa::kAvx512Bf16) return relu_avx512_bf16;
  if (isa() >= Isa::kAvx512) return relu_avx512;
  if (isa() >= Isa::kAvx2) return relu_avx2;
#endif
  return run_relu<VectorGeneric>;
}

int64_t rows_per_piece(int64_t size) { return std::max<int64_t>(1, kMinPieceElements / size); }

}  // namespace

void silu_and_mul(const SiluAndMul& op) {
  const SiluAndMulFunction function = silu_and_mul_function();
  parallel_for(op.num_tokens, rows_per_piece(op.size), [&](int64_t begin, int64_t end) { function(op, begin, end); });
}

void relu(const Relu& op) {
  const ReluFunction function = relu_function();
  parallel_for(op.num_tokens, rows_per_piece(op.size), [&](int64_t begin, int64_t end) { function(op, begin, end); });
}

}  // namespace pagedcore::cpu
