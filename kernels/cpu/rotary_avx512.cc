// Rotary embedding with AVX-512.
#include "cpu/rotary_tokens.h"
#include "cpu/vector_avx512.h"

namespace pagedcore::cpu {

RotaryTokens rotary_tokens_avx512(DType dtype) { return rotary_tokens_for<VectorAvx512, BFloat16, Float16>(dtype); }

}  // namespace pagedcore::cpu
