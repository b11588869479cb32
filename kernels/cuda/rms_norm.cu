// RMSNorm with an optional residual addition before it (Zhang and Sennrich 2019, equation 4): one pass, a row to a
// thread block.
#include "row_vector.cuh"

namespace pagedcore::cuda {
namespace {

// `kVectors`: how many vectors of its row each thread keeps in registers between the two uses.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kMaxNormThreads) rms_norm_kernel(const __grid_constant__ RMSNorm a) {
  __shared__ float warp_sums[kWarpSize];
  allow_next_kernel();
  wait_for_previous_kernel();
  const int row_vectors = a.hidden_size / kVector;
  const int64_t row = int64_t{blockIdx.x} * row_vectors;
  const Vector<T>* x = static_cast<const Vector<T>*>(a.x) + row;
  Vector<T>* residual = static_cast<Vector<T>*>(a.residual) + row;
  const Vector<T>* weight = static_cast<const Vector<T>*>(a.weight);
  Vector<T>* out = static_cast<Vector<T>*>(a.out) + row;

  Vector<T> kept[kVectors];
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int index = v * blockDim.x + threadIdx.x;
    if (index >= row_vectors) break;
    kept[v] = x[index];
    if (a.residual != nullptr) add_to_residual(kept[v], residual[index]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += to_float(kept[v].values[i]) * to_float(kept[v].values[i]);
  }
  const float scale = rsqrtf(reduce_block(sum, warp_sums) / a.hidden_size + a.eps);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int index = v * blockDim.x + threadIdx.x;
    if (index >= row_vectors) break;
    const Vector<T> w = weight[index];
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // Rounded before the weight is applied, as in the models' reference implementation.
      result.values[i] =
          from_float<T>(to_float(w.values[i]) * to_float(from_float<T>(to_float(kept[v].values[i]) * scale)));
    }
    out[index] = result;
  }
}

}  // namespace

void rms_norm(const RMSNorm& a, Stream stream) {
  if (a.num_tokens == 0) return;
  const int threads = norm_threads("rms_norm", a.hidden_size);
  dispatch_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(a.hidden_size <= threads * kVector ? rms_norm_kernel<T, 1> : rms_norm_kernel<T, kMaxVectors>, a.num_tokens,
           threads, 0, stream, a);
  });
}

}  // namespace pagedcore::cuda
