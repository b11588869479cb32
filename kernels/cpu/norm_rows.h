// RMSNorm and LayerNorm, written once for all instruction sets.
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

// What is to be normalized of a row: x, or the residual after x was added to it.
template <class V, class T, class Op>
const T* row_to_normalize(const Op& op, int64_t row) {
  const int64_t offset = row * op.hidden_size;
  const T* const x = static_cast<const T*>(op.x) + offset;
  if (op.residual == nullptr) return x;
  T* const residual = static_cast<T*>(op.residual) + offset;
  add_to_residual<V>(residual, x, op.hidden_size);
  return residual;
}

template <class V, class T>
void rms_normalize(T* out, const T* x, const T* weight, int64_t size, float eps) {
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
    rms_normalize<V>(static_cast<T*>(op.out) + row * op.hidden_size, row_to_normalize<V, T>(op, row),
                     static_cast<const T*>(op.weight), op.hidden_size, op.eps);
  }
}

// `out` may be `x`.
template <class V, class T>
void layer_normalize(T* out, const T* x, const T* weight, const T* bias, int64_t size, float eps) {
  auto sum = V::set1(0.0f), squares = sum;
  for_each_part<V>(size, [&](RowPart<V> part) { sum = V::add(sum, part.load(x)); });
  const auto minus_mean = V::set1(-V::sum(sum) / static_cast<float>(size));
  // A pass of its own: the mean of the squares less the square of the mean would lose what a large mean covers.
  for_each_part<V>(size, [&](RowPart<V> part) {
    const auto centered = part.zero_beyond(V::add(part.load(x), minus_mean));
    squares = V::fma(centered, centered, squares);
  });
  const auto scale = V::set1(1.0f / std::sqrt(V::sum(squares) / static_cast<float>(size) + eps));
  for_each_part<V>(size, [&](RowPart<V> part) {
    const auto normalized = V::mul(V::add(part.load(x), minus_mean), scale);
    part.store(out, V::fma(normalized, part.load(weight), part.load(bias)));
  });
}

template <class V, class T>
void layer_norm_rows(const LayerNorm& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    layer_normalize<V>(static_cast<T*>(op.out) + row * op.hidden_size, row_to_normalize<V, T>(op, row),
                       static_cast<const T*>(op.weight), static_cast<const T*>(op.bias), op.hidden_size, op.eps);
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

template <class V>
void run_layer_norm(const LayerNorm& op, int64_t begin, int64_t end) {
  switch (op.dtype) {
    case DType::kFloat32:
      return layer_norm_rows<V, float>(op, begin, end);
    case DType::kBFloat16:
      return layer_norm_rows<V, BFloat16>(op, begin, end);
    case DType::kFloat16:
      return layer_norm_rows<V, Float16>(op, begin, end);
  }
}

}  // namespace
}  // namespace pagedcore::cpu
