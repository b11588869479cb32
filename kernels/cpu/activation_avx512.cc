#ifdef __x86_64__

#include "cpu/activation_rows.h"
#include "cpu/vector_avx512.h"

namespace pagedcore::cpu {

void silu_and_mul_avx512(const SiluAndMul& op, int64_t begin, int64_t end) {
  run_silu_and_mul<VectorAvx512>(op, begin, end);
}

void silu_and_mul_avx512_bf16(const SiluAndMul& op, int64_t begin, int64_t end) {
  run_silu_and_mul<VectorAvx512Bf16>(op, begin, end);
}

void relu_avx512(const Relu& op, int64_t begin, int64_t end) { run_relu<VectorAvx512>(op, begin, end); }

void relu_avx512_bf16(const Relu& op, int64_t begin, int64_t end) { run_relu<VectorAvx512Bf16>(op, begin, end); }

}  // namespace pagedcore::cpu

#endif
