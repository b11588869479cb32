// The packed weight's layout, and what the instruction sets' tile functions have in common.
//
// A weight [out_features, in_features] is cut into panels of kPanelWidth output features, which lie one behind the
// other; the last one is filled up with zeros. A panel holds, for each step along in_features, the step's elements of
// all its columns: step k is [kPanelWidth][kGroup], where kGroup consecutive inputs of a column lie together: 2 for
// bfloat16 (what a dot-product instruction takes), 1 else. An odd number of inputs is filled up with a zero. The layout
// is the same for every instruction set.
#pragma once

#include <cstdint>

#include "ops.h"

namespace pagedcore::cpu {

constexpr int kPanelWidth = 32;

constexpr int linear_group(DType dtype) { return dtype == DType::kBFloat16 ? 2 : 1; }
constexpr int linear_element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Elements of one panel.
constexpr int64_t panel_size(int64_t in_features, DType dtype) {
  const int64_t group = linear_group(dtype);
  return (in_features + group - 1) / group * group * kPanelWidth;
}

// Rows [row_begin, row_end) of y for the columns of panels [panel_begin, panel_end).
struct LinearTask {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

// Each output is accumulated by one lane over in_features in ascending order, whatever the number of rows: a row's
// result depends neither on its neighbours nor on how the work is cut.
using LinearFunction = void (*)(const PackedLinear&, const LinearTask&);

void linear_generic(const PackedLinear&, const LinearTask&);
#ifdef __x86_64__
void linear_avx2(const PackedLinear&, const LinearTask&);
void linear_avx512(const PackedLinear&, const LinearTask&);
void linear_avx512_bf16(const PackedLinear&, const LinearTask&);
#endif

}  // namespace pagedcore::cpu
