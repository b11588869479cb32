// The x86 instruction sets' variants of silu_and_mul and relu.
#pragma once

#include <cstdint>

#include "ops.h"

namespace pagedcore::cpu {

// Rows [begin, end).
using SiluAndMulFunction = void (*)(const SiluAndMul&, int64_t begin, int64_t end);
using ReluFunction = void (*)(const Relu&, int64_t begin, int64_t end);

#ifdef __x86_64__
void silu_and_mul_avx2(const SiluAndMul&, int64_t begin, int64_t end);
void silu_and_mul_avx512(const SiluAndMul&, int64_t begin, int64_t end);
void silu_and_mul_avx512_bf16(const SiluAndMul&, int64_t begin, int64_t end);
void relu_avx2(const Relu&, int64_t begin, int64_t end);
void relu_avx512(const Relu&, int64_t begin, int64_t end);
void relu_avx512_bf16(const Relu&, int64_t begin, int64_t end);
#endif

}  // namespace pagedcore::cpu
