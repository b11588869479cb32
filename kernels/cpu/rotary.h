// The interface between the rotary kernel's outer loop and its implementation for one instruction set.
#pragma once

#include "ops.h"

namespace pagedcore::cpu {

constexpr int kMaxRotaryHeadDim = 512;

// Do tokens [begin, end).
using RotaryTokens = void (*)(const RotaryWriteKV& op, int begin, int end);

RotaryTokens rotary_tokens_generic(DType dtype);
RotaryTokens rotary_tokens_avx2(DType dtype);
RotaryTokens rotary_tokens_avx512(DType dtype);

}  // namespace pagedcore::cpu
