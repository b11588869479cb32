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

}  // namespace

void silu_and_mul(const SiluAndMul& op) {
  const SiluAndMulFunction function = silu_and_mul_function();
  parallel_for(op.num_tokens, std::max<int64_t>(1, kMinPieceElements / op.size),
               [&](int64_t begin, int64_t end) { function(op, begin, end); });
}

}  // namespace pagedcore::cpu
