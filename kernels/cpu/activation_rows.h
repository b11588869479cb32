// silu(gate) * up and max(x, 0), written once for all instruction sets.
#pragma once

#include <limits>

#include "cpu/activation.h"
#include "cpu/vector_elements.h"
#include "cpu/vector_row.h"

namespace pagedcore::cpu {
namespace {

// e^x to about two units in the last place; x is clamped to where e^x is a normal number.
template <class V>
typename V::Reg exp(typename V::Reg x) {
  x = V::clamp(x, -87.0f, 88.0f);
  const auto n = V::round(V::mul(x, V::set1(0x1.715476p0f)));  // 1 / ln 2
  // x - n ln 2, with ln 2 as a number of few bits, whose product with n is exact, and the rest.
  auto f = V::fma(n, V::set1(-0x1.62ep-1f), x);
  f = V::fma(n, V::set1(-0x1.0bfbe8p-15f), f);
  // The Taylor polynomial on [-ln 2 / 2, ln 2 / 2]: the first term left out is 1.2e-7 of the result.
  constexpr float kTerms[] = {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
  auto p = V::set1(1.0f / 720.0f);
  for (const float term : kTerms) p = V::fma(p, f, V::set1(term));
  return V::scale(p, n);
}

template <class V, class T>
void silu_and_mul_rows(const SiluAndMul& op, int64_t begin, int64_t end) {
  const auto one = V::set1(1.0f), minus_one = V::set1(-1.0f);
  for (int64_t row = begin; row < end; ++row) {
    const T* const gate = static_cast<const T*>(op.x) + row * 2 * op.size;
    const T* const up = gate + op.size;
    T* const out = static_cast<T*>(op.out) + row * op.size;
    for_each_part<V>(op.size, [&](RowPart<V> part) {
      // Below -87 what is left of silu is under 2e-36: kept from falling out of e^x's range.
      const auto g = V::clamp(part.load(gate), -87.0f, std::numeric_limits<float>::infinity());
      const auto silu = V::div(g, V::add(one, exp<V>(V::mul(g, minus_one))));
      part.store(out, V::mul(silu, part.load(up)));
    });
  }
}

template <class V>
void run_silu_and_mul(const SiluAndMul& op, int64_t begin, int64_t end) {
  switch (op.dtype) {
    case DType::kFloat32:
      return silu_and_mul_rows<V, float>(op, begin, end);
    case DType::kBFloat16:
      return silu_and_mul_rows<V, BFloat16>(op, begin, end);
    case DType::kFloat16:
      return silu_and_mul_rows<V, Float16>(op, begin, end);
  }
}

// Rows lie side by side: all of them are one.
template <class V, class T>
void relu_rows(const Relu& op, int64_t begin, int64_t end) {
  const T* const x = static_cast<const T*>(op.x) + begin * op.size;
  T* const out = static_cast<T*>(op.out) + begin * op.size;
  for_each_part<V>((end - begin) * op.size, [&](RowPart<V> part) {
    part.store(out, V::clamp(part.load(x), 0.0f, std::numeric_limits<float>::infinity()));
  });
}

template <class V>
void run_relu(const Relu& op, int64_t begin, int64_t end) {
  switch (op.dtype) {
    case DType::kFloat32:
      return relu_rows<V, float>(op, begin, end);
    case DType::kBFloat16:
      return relu_rows<V, BFloat16>(op, begin, end);
    case DType::kFloat16:
      return relu_rows<V, Float16>(op, begin, end);
  }
}

}  // namespace
}  // namespace pagedcore::cpu
