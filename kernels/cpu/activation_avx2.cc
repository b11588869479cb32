#ifdef __x86_64__

#include "cpu/activation_rows.h"
#include "cpu/vector_avx2.h"

namespace pagedcore::cpu {

void silu_and_mul_avx2(const SiluAndMul& op, int64_t begin, int64_t end) {
  run_silu_and_mul<VectorAvx2>(op, begin, end);
}

void relu_avx2(const Relu& op, int64_t begin, int64_t end) { run_relu<VectorAvx2>(op, begin, end); }

}  // namespace pagedcore::cpu

#endif
