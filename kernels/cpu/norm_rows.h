// RMSNorm, written once for all instruction sets.
#pragma once

#include <cmath>

#include "cpu/norm.h"
#include "cpu/vector_elements.h"
#include "cpu/vector_row.h"

namespace pagedcore::cpu {
namespace {

// residual += x, rounded to the element type: it is the rounded sum that is normalized, as in a model that adds and
// normalizes apart.
template <class V, class T>
void add_to_residual(T* residual, const T* x, int64_t size) {
  for_each_part<V>(size, [&](RowPart<V> part) { part.store(residual, V::add(part.load(residual), part.load(x))); });
}

template <class V, class T>
void normalize(T* out, const T* x, const T* weight, int64_t size, float eps) {
  auto squares = V::set1(0.0f);
  for_each_part<V>(size, [&](RowPart<V> part) {
    const auto value = part.load(x);
    squares = V::fma(value, value, squares);
  });
  const auto scale = V::set1(1.0f / std::sqrt(V::sum(squares) / static_cast<float>(size) + eps));
  for_each_part<V>(size,
                   [&](RowPart<V> part) { part.store(out, V::mul(V::mul(part.load(x), scale), part.load(weight))); });
}

template <class V, class T>
void rms_norm_rows(const RMSNorm& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = row * op.hidden_size;
    const T* x = static_cast<const T*>(op.x) + offset;
    if (op.residual != nullptr) {
      T* const residual = static_cast<T*>(op.residual) + offset;
      add_to_residual<V>(residual, x, op.hidden_size);
      x = residual;
    }
    normalize<V>(static_cast<T*>(op.out) + offset, x, static_cast<const T*>(op.weight), op.hidden_size, op.eps);
  }
}

template <class V>
void run_rms_norm(const RMSNorm& op, int64_t begin, int64_t end) {
  switch (op.dtype) {
    case DType::kFloat32:
      return rms_norm_rows<V, float>(op, begin, end);
    case DType::kBFloat16:
      return rms_norm_rows<V, BFloat16>(op, begin, end);
    case DType::kFloat16:
      return rms_norm_rows<V, Float16>(op, begin, end);
  }
}

}  // namespace
}  // namespace pagedcore::cpu
