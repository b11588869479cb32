#ifdef __x86_64__

#include "cpu/norm_rows.h"
#include "cpu/vector_avx512.h"

namespace pagedcore::cpu {

void rms_norm_avx512(const RMSNorm& op, int64_t begin, int64_t end) { run_rms_norm<VectorAvx512>(op, begin, end); }

void rms_norm_avx512_bf16(const RMSNorm& op, int64_t begin, int64_t end) {
  run_rms_norm<VectorAvx512Bf16>(op, begin, end);
}

void layer_norm_avx512(const LayerNorm& op, int64_t begin, int64_t end) {
  run_layer_norm<VectorAvx512>(op, begin, end);
}

void layer_norm_avx512_bf16(const LayerNorm& op, int64_t begin, int64_t end) {
  run_layer_norm<VectorAvx512Bf16>(op, begin, end);
}

}  // namespace pagedcore::cpu

#endif
