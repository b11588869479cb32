// Rotary embedding in plain C++.
#include "cpu/rotary_tokens.h"
#include "cpu/vector_generic.h"

namespace pagedcore::cpu {

RotaryTokens rotary_tokens_generic(DType dtype) { return rotary_tokens_for<VectorGeneric, BFloat16, Float16>(dtype); }

}  // namespace pagedcore::cpu
