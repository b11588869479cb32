// The x86 instruction sets' variants of rms_norm and layer_norm.
#pragma once

#include <cstdint>

#include "ops.h"

namespace pagedcore::cpu {

// Rows [begin, end).
using RMSNormFunction = void (*)(const RMSNorm&, int64_t begin, int64_t end);
using LayerNormFunction = void (*)(const LayerNorm&, int64_t begin, int64_t end);

#ifdef __x86_64__
void rms_norm_avx2(const RMSNorm&, int64_t begin, int64_t end);
void rms_norm_avx512(const RMSNorm&, int64_t begin, int64_t end);
void rms_norm_avx512_bf16(const RMSNorm&, int64_t begin, int64_t end);
void layer_norm_avx2(const LayerNorm&, int64_t begin, int64_t end);
void layer_norm_avx512(const LayerNorm&, int64_t begin, int64_t end);
void layer_norm_avx512_bf16(const LayerNorm&, int64_t begin, int64_t end);
#endif

}  // namespace pagedcore::cpu
