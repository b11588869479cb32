#include "cpu/norm.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/norm_rows.h"
#include "cpu/thread_pool.h"
#include "cpu/vector_generic.h"

namespace pagedcore::cpu {
namespace {

constexpr int64_t kMinPieceElements = 16 << 10;  // worth handing to another thread

RMSNormFunction rms_norm_function() {
#ifdef __x86_64__
  if (isa() >= Isa::kAvx512Bf16) return rms_norm_avx512_bf16;
  if (isa() >= Isa::kAvx512) return rms_norm_avx512;
  if (isa() >= Isa::kAvx2) return rms_norm_avx2;
#endif
  return run_rms_norm<VectorGeneric>;
}

LayerNormFunction layer_norm_function() {
#ifdef __x86_64__
  if (isa() >= Isa::kAvx512Bf16) return layer_norm_avx512_bf16;
  if (isa() >= Isa::kAvx512) return layer_norm_avx512;
  if (isa() >= Isa::kAvx2) return layer_norm_avx2;
#endif
  return run_layer_norm<VectorGeneric>;
}

int64_t rows_per_piece(int64_t hidden_size) { return std::max<int64_t>(1, kMinPieceElements / hidden_size); }

}  // namespace

void rms_norm(const RMSNorm& op) {
  const RMSNormFunction function = rms_norm_function();
  parallel_for(op.num_tokens, rows_per_piece(op.hidden_size),
               [&](int64_t begin, int64_t end) { function(op, begin, end); });
}

void layer_norm(const LayerNorm& op) {
  const LayerNormFunction function = layer_norm_function();
  parallel_for(op.num_tokens, rows_per_piece(op.hidden_size),
               [&](int64_t begin, int64_t end) { function(op, begin, end); });
}

}  // namespace pagedcore::cpu
