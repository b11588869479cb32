// max(x, 0).
#include "row_vector.cuh"

namespace pagedcore::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) relu_kernel(const __grid_constant__ Relu a) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t num_vectors = int64_t{a.num_tokens} * (a.size / kVector);  // rows lie side by side: all are one
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= num_vectors) return;
  Vector<T> values = static_cast<const Vector<T>*>(a.x)[index];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    // Not a maximum, which would make zero of NaN.
    if (to_float(values.values[i]) < 0.f) values.values[i] = T{};
  }
  static_cast<Vector<T>*>(a.out)[index] = values;
}

}  // namespace

void relu(const Relu& a, Stream stream) {
  if (a.num_tokens == 0) return;
  if (a.size % kVector != 0) {
    throw std::invalid_argument("size: the CUDA relu needs a multiple of " + std::to_string(kVector) + ", got " +
                                std::to_string(a.size));
  }
  const int64_t num_vectors = int64_t{a.num_tokens} * (a.size / kVector);
  const dim3 grid(static_cast<unsigned>((num_vectors + kThreads - 1) / kThreads));
  dispatch_dtype(a.dtype, [&](auto zero) { launch(relu_kernel<decltype(zero)>, grid, kThreads, 0, stream, a); });
}

}  // namespace pagedcore::cuda
