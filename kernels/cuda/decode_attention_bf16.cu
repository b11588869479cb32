#include "decode_attention.cuh"

namespace pagedcore::cuda {
template void decode<__nv_bfloat16>(const PagedAttention&, Stream);
}
