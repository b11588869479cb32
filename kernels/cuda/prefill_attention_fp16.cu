#include "prefill.cuh"

namespace pagedcore::cuda {
template void prefill<__half>(const PagedAttention&, Stream);
}
