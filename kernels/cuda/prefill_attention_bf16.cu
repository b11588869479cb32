#include "prefill.cuh"

namespace pagedcore::cuda {
template void prefill<__nv_bfloat16>(const PagedAttention&, Stream);
}
