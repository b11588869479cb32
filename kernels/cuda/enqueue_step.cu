// Starting a captured step in one call.
#include "common.cuh"

namespace pagedcore::cuda {

void enqueue_step(const EnqueueStep& a, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(a.packed, a.host_packed, a.packed_bytes, cudaMemcpyHostToDevice, on),
        "copy of a step's inputs");
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(a.graph), on), "launch of a step's graph");
  check(cudaMemcpyAsync(a.host_tokens, a.tokens, a.token_bytes, cudaMemcpyDeviceToHost, on), "copy of a step's tokens");
  check(cudaEventRecord(static_cast<cudaEvent_t>(a.event), on), "event of a step");
}

}  // namespace pagedcore::cuda
