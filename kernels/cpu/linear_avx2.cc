#ifdef __x86_64__

#include "cpu/linear_tile.h"
#include "cpu/vector_avx2.h"

namespace pagedcore::cpu {

void linear_avx2(const PackedLinear& op, const LinearTask& task) {
  run_linear<VectorAvx2, WidenPairStep<VectorAvx2>, 2>(op, task);
}

}  // namespace pagedcore::cpu

#endif
