// The choice between the prefill kernels.
#pragma once

#include "prefill_attention.cuh"
#include "prefill_attention_sm90.cuh"

namespace pagedcore::cuda {

template <typename T>
void prefill(const PagedAttention& a, Stream stream) {
  dispatch_head_dim(a.head_dim, [&](auto dim) {
    if constexpr (dim.value == 64 || dim.value == 128) {
      if (has_prefill_sm90<T, dim.value>()) return launch_prefill_sm90<T, dim.value>(a, stream);
    }
    launch_prefill<T, dim.value>(a, stream);
  });
}

}  // namespace pagedcore::cuda
