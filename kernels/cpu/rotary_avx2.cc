// Rotary embedding with AVX2, FMA and F16C.
#include "cpu/rotary_tokens.h"
#include "cpu/vector_avx2.h"

namespace pagedcore::cpu {

RotaryTokens rotary_tokens_avx2(DType dtype) { return rotary_tokens_for<VectorAvx2, BFloat16, Float16>(dtype); }

}  // namespace pagedcore::cpu
