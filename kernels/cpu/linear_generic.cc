#include "cpu/linear_tile.h"
#include "cpu/vector_generic.h"

namespace pagedcore::cpu {

void linear_generic(const PackedLinear& op, const LinearTask& task) {
  run_linear<VectorGeneric, WidenPairStep<VectorGeneric>, 4>(op, task);
}

}  // namespace pagedcore::cpu
