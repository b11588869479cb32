// LayerNorm with an optional residual addition before it (Ba et al. 2016, equation 4): one pass over memory, a row to a
// thread block.
#include "row_vector.cuh"

namespace pagedcore::cuda {
namespace {

// `kVectors`: how many vectors of its row each thread keeps in registers between their uses.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kMaxNormThreads) layer_norm_kernel(const __grid_constant__ LayerNorm a) {
  __shared__ float sums[kWarpSize], square_sums[kWarpSize];
  allow_next_kernel();
  wait_for_previous_kernel();
  const int row_vectors = a.hidden_size / kVector;
  const int64_t row = int64_t{blockIdx.x} * row_vectors;
  const Vector<T>* x = static_cast<const Vector<T>*>(a.x) + row;
  Vector<T>* residual = static_cast<Vector<T>*>(a.residual) + row;
  const Vector<T>* weight = static_cast<const Vector<T>*>(a.weight);
  const Vector<T>* bias = static_cast<const Vector<T>*>(a.bias);
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
    for (int i = 0; i < kVector; ++i) sum += to_float(kept[v].values[i]);
  }
  const float mean = reduce_block(sum, sums) / a.hidden_size;
  // From the registers once more: the mean of the squares less the square of the mean would lose what a large mean
  // covers.
  float squares = 0.f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int index = v * blockDim.x + threadIdx.x;
    if (index >= row_vectors) break;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float centered = to_float(kept[v].values[i]) - mean;
      squares += centered * centered;
    }
  }
  const float scale = rsqrtf(reduce_block(squares, square_sums) / a.hidden_size + a.eps);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int index = v * blockDim.x + threadIdx.x;
    if (index >= row_vectors) break;
    const Vector<T> w = weight[index], b = bias[index];
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float normalized = (to_float(kept[v].values[i]) - mean) * scale;
      result.values[i] = from_float<T>(fmaf(normalized, to_float(w.values[i]), to_float(b.values[i])));
    }
    out[index] = result;
  }
}

}  // namespace

void layer_norm(const LayerNorm& a, Stream stream) {
  if (a.num_tokens == 0) return;
  const int threads = norm_threads("layer_norm", a.hidden_size);
  dispatch_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(a.hidden_size <= threads * kVector ? layer_norm_kernel<T, 1> : layer_norm_kernel<T, kMaxVectors>,
           a.num_tokens, threads, 0, stream, a);
  });
}

}  // namespace pagedcore::cuda
