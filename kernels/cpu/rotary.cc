// Rotary embedding and KV cache write: chooses the instruction set and spreads the tokens over the pool.
#include "cpu/rotary.h"

#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace pagedcore::cpu {
namespace {

constexpr int kTokensPerPiece = 16;  // a token takes well under a microsecond: fewer are not worth waking a thread for

RotaryTokens tokens_for(DType dtype) {
  switch (isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return rotary_tokens_avx512(dtype);
    case Isa::kAvx2:
      return rotary_tokens_avx2(dtype);
    default:
      return rotary_tokens_generic(dtype);
  }
}

}  // namespace

void rotary_write_kv(const RotaryWriteKV& op) {
  const RotaryTokens tokens = tokens_for(op.dtype);
  if (op.num_tokens <= kTokensPerPiece) return tokens(op, 0, op.num_tokens);
  parallel_for(op.num_tokens, kTokensPerPiece,
               [&](int64_t begin, int64_t end) { tokens(op, static_cast<int>(begin), static_cast<int>(end)); });
}

}  // namespace pagedcore::cpu
