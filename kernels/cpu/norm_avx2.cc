#ifdef __x86_64__

#include "cpu/norm_rows.h"
#include "cpu/vector_avx2.h"

namespace pagedcore::cpu {

void rms_norm_avx2(const RMSNorm& op, int64_t begin, int64_t end) { run_rms_norm<VectorAvx2>(op, begin, end); }

void layer_norm_avx2(const LayerNorm& op, int64_t begin, int64_t end) { run_layer_norm<VectorAvx2>(op, begin, end); }

}  // namespace pagedcore::cpu

#endif
