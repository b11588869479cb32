// SwiGLU's elementwise part (Shazeer 2020, equation 6): silu(gate) * up.
#include "row_vector.cuh"

namespace pagedcore::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) silu_and_mul_kernel(const __grid_constant__ SiluAndMul a) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int row_vectors = a.size / kVector;
  const int index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= row_vectors) return;
  for (int token = blockIdx.y; token < a.num_tokens; token += gridDim.y) {
    const Vector<T>* row = static_cast<const Vector<T>*>(a.x) + int64_t{token} * 2 * row_vectors;
    const Vector<T> gate = row[index], up = row[row_vectors + index];
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float g = to_float(gate.values[i]);
      // Rounded between the two steps, as in the models' reference implementation.
      const float activated = to_float(from_float<T>(g / (1.f + exp2_fast(-1.4426950408889634f * g))));
      result.values[i] = from_float<T>(activated * to_float(up.values[i]));
    }
    (static_cast<Vector<T>*>(a.out) + int64_t{token} * row_vectors)[index] = result;
  }
}

}  // namespace

void silu_and_mul(const SiluAndMul& a, Stream stream) {
  if (a.num_tokens == 0) return;
  if (a.size % kVector != 0) {
    throw std::invalid_argument("size: the CUDA silu_and_mul needs a multiple of " + std::to_string(kVector) +
                                ", got " + std::to_string(a.size));
  }
  const dim3 grid(ceil_div(a.size / kVector, kThreads), min(a.num_tokens, 65535));
  dispatch_dtype(a.dtype,
                 [&](auto zero) { launch(silu_and_mul_kernel<decltype(zero)>, grid, kThreads, 0, stream, a); });
}

}  // namespace pagedcore::cuda
