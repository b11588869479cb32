// What attention computes in registers, over a vector type: a product of small matrices, and 2^x.
#pragma once

#include <cstdint>

namespace pagedcore::cpu {

// c[rows, columns] (+)= a[rows, steps] b[steps, columns], a and b in words. Columns are counted in vectors.
struct Product {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_step_stride;
  int64_t b_vector_stride;
  float* c;
  int64_t c_stride;
  int steps;
  bool accumulate;  // add to c
};

template <class Math, int kRows, int kColumns>
void multiply_block(const Product& product, int column) {
  using V = typename Math::Vector;
  const Product p = product;  // a copy, so that the stores below do not make the compiler read it again
  const float* b = p.b + column * p.b_vector_stride;
  typename V::Reg sums[kRows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      sums[i][j] = p.accumulate ? V::load(p.c + i * p.c_stride + (column + j) * V::kWidth) : V::set1(0.0f);
    }
  for (int step = 0; step < p.steps; ++step) {
    typename V::Reg line[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) line[j] = V::load(b + step * p.b_step_stride + j * p.b_vector_stride);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename V::Reg word = V::set1(p.a[i * p.a_stride + step]);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) sums[i][j] = Math::multiply_add(word, line[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) V::store(p.c + i * p.c_stride + (column + j) * V::kWidth, sums[i][j]);
}

template <class Math, int kRows, int kColumns = Math::Vector::kMaxColumns>
void multiply_rows(const Product& product, int column, int columns) {
  for (; column + kColumns <= columns; column += kColumns) multiply_block<Math, kRows, kColumns>(product, column);
  if constexpr (kColumns > 1) {
    if (column < columns) multiply_rows<Math, kRows, kColumns - 1>(product, column, columns);
  }
}

template <class Math, int kRows = Math::Vector::kMaxRows>
void multiply(const Product& product, int rows, int columns) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply<Math, kRows - 1>(product, rows, columns);
  }
  multiply_rows<Math, kRows>(product, 0, columns);
}

// 2^x for x <= 0; not below 2^-126. The polynomial is 2^f on [-1/2, 1/2], a minimax fit with a relative error of 3e-9.
template <class V>
typename V::Reg exp2_vector(typename V::Reg x) {
  x = V::clamp(x, -126.0f, 126.0f);
  const typename V::Reg whole = V::round(x);
  const typename V::Reg f = V::sub(x, whole);
  typename V::Reg power = V::set1(1.55946776e-4f);
  power = V::fma(power, f, V::set1(1.34066439e-3f));
  power = V::fma(power, f, V::set1(9.61769297e-3f));
  power = V::fma(power, f, V::set1(5.55031055e-2f));
  power = V::fma(power, f, V::set1(2.40226528e-1f));
  power = V::fma(power, f, V::set1(6.93147215e-1f));
  power = V::fma(power, f, V::set1(1.0f));
  return V::scale(power, whole);
}

}  // namespace pagedcore::cpu
