#include "cpu/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace pagedcore::cpu {
namespace {

// Multiplications of an item of work, a panel for a block of rows: enough rows to pay for fetching the panel, and items
// enough to share evenly.
constexpr int64_t kMaxItemWork = 4 << 20;
// Multiplications worth handing to another thread.
constexpr int64_t kMinPieceWork = 16 << 10;
constexpr int64_t kRowMultiple = 24;  // of every instruction set's tile height

LinearFunction linear_function() {
#ifdef __x86_64__
  switch (isa()) {
    case Isa::kAvx512Bf16:
      return linear_avx512_bf16;
    case Isa::kAvx512:
      return linear_avx512;
    case Isa::kAvx2:
      return linear_avx2;
    case Isa::kGeneric:
      break;
  }
#endif
  return linear_generic;
}

int64_t num_panels(int64_t out_features) { return (out_features + kPanelWidth - 1) / kPanelWidth; }

template <class Element>
void pack_panel(Element* panel, const Element* weight, int64_t num_columns, int64_t in_features, int64_t group) {
  const int64_t num_steps = (in_features + group - 1) / group;
  for (int64_t step = 0; step < num_steps; ++step) {
    for (int64_t column = 0; column < kPanelWidth; ++column) {
      for (int64_t i = 0; i < group; ++i) {
        const int64_t k = step * group + i;
        const bool inside = column < num_columns && k < in_features;
        panel[(step * kPanelWidth + column) * group + i] = inside ? weight[column * in_features + k] : Element{0};
      }
    }
  }
}

template <class Element>
void pack(void* packed, const void* weight, int64_t out_features, int64_t in_features, DType dtype) {
  parallel_for(num_panels(out_features), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanelWidth;
      pack_panel(static_cast<Element*>(packed) + panel * panel_size(in_features, dtype),
                 static_cast<const Element*>(weight) + column * in_features,
                 std::min<int64_t>(kPanelWidth, out_features - column), in_features, linear_group(dtype));
    }
  });
}

}  // namespace

int64_t packed_linear_bytes(int32_t out_features, int32_t in_features, DType dtype) {
  return num_panels(out_features) * panel_size(in_features, dtype) * linear_element_size(dtype);
}

void pack_linear(void* packed, const void* weight, int32_t out_features, int32_t in_features, DType dtype) {
  if (linear_element_size(dtype) == 4) {
    pack<uint32_t>(packed, weight, out_features, in_features, dtype);
  } else {
    pack<uint16_t>(packed, weight, out_features, in_features, dtype);
  }
}

void packed_linear(const PackedLinear& op) {
  if (op.num_tokens == 0) return;
  const LinearFunction function = linear_function();
  const int64_t row_work = int64_t{op.in_features} * kPanelWidth;
  const int64_t max_rows = std::max(kRowMultiple, kMaxItemWork / row_work / kRowMultiple * kRowMultiple);
  const int64_t block_rows = std::min<int64_t>(op.num_tokens, max_rows);
  const int64_t panels = num_panels(op.out_features);
  const int64_t blocks = (op.num_tokens + block_rows - 1) / block_rows;
  const int64_t grain = std::max<int64_t>(1, kMinPieceWork / (block_rows * row_work));
  parallel_for(blocks * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end;) {
      const int64_t block = item / panels, panel = item % panels;
      const int64_t panel_end = std::min(panels, panel + end - item);
      function(op, {.row_begin = block * block_rows,
                    .row_end = std::min<int64_t>(op.num_tokens, (block + 1) * block_rows),
                    .panel_begin = panel,
                    .panel_end = panel_end});
      item += panel_end - panel;
    }
  });
}

}  // namespace pagedcore::cpu
