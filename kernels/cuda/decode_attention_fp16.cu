#include "decode_attention.cuh"

namespace pagedcore::cuda {
template void decode<__half>(const PagedAttention&, Stream);
}
