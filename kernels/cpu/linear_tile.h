// The register tile of the linear layers, written once for all instruction sets.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/linear.h"
#include "cpu/vector_elements.h"

namespace pagedcore::cpu {
namespace {

// One step along in_features of a tile: inputs k of `Rows` rows times the step's weights of `kColumns` columns.
// fp32 and fp16: one input a step, fused multiply-add.
template <class V, class T>
struct MultiplyStep {
  using Vector = V;
  using Element = T;
  static constexpr int kGroup = 1;

  template <int Rows, int Registers>
  static void run(const T* x, int64_t x_stride, const T* w, typename V::Reg (&sums)[Rows][Registers]) {
    typename V::Reg weights[Registers];
    for (int c = 0; c < Registers; ++c) weights[c] = V::load(w + c * V::kWidth);
    for (int r = 0; r < Rows; ++r) {
      const auto input = V::set1(to_float(x[r * x_stride]));
      for (int c = 0; c < Registers; ++c) sums[r][c] = V::fma(input, weights[c], sums[r][c]);
    }
  }
};

// bf16 without a dot-product instruction: a pair of inputs a step, widened by shifting.
template <class V>
struct WidenPairStep {
  using Vector = V;
  using Element = BFloat16;
  static constexpr int kGroup = 2;

  template <int Rows, int Registers>
  static void run(const BFloat16* x, int64_t x_stride, const BFloat16* w, typename V::Reg (&sums)[Rows][Registers]) {
    typename V::Reg low[Registers], high[Registers];
    for (int c = 0; c < Registers; ++c) V::load_pairs(w + c * V::kWidth * 2, &low[c], &high[c]);
    for (int r = 0; r < Rows; ++r) {
      const auto input_low = V::set1(to_float(x[r * x_stride]));
      for (int c = 0; c < Registers; ++c) sums[r][c] = V::fma(input_low, low[c], sums[r][c]);
      const auto input_high = V::set1(to_float(x[r * x_stride + 1]));
      for (int c = 0; c < Registers; ++c) sums[r][c] = V::fma(input_high, high[c], sums[r][c]);
    }
  }
};

// Weights to fetch for later while a tile computes, `step` bytes for each step of the tile. The processor's own
// prefetching does not reach far enough to keep the memory busy during the arithmetic.
struct Prefetch {
  const char* next;
  int64_t step;
};

constexpr int64_t kCacheLine = 64;
constexpr int64_t kPrefetchDistance = 4096;         // where a panel is read once: this far ahead of the reader
constexpr int64_t kMaxPrefetchedPanel = 256 << 10;  // has to wait in the second-level cache beside the current one

// With several tiles to a panel, the first would wait for memory and the others leave it idle: each fetches its part of
// the next panel.
inline Prefetch plan_prefetch(const char* w, int64_t panel_bytes, int64_t step_bytes, int64_t tile, int64_t num_tiles) {
  if (num_tiles == 1 || panel_bytes > kMaxPrefetchedPanel) return {w + kPrefetchDistance, step_bytes};
  return {w + panel_bytes + panel_bytes * tile / num_tiles, step_bytes / num_tiles};
}

template <class V, class T, class Y, int Rows, int Registers>
void store_tile(const typename V::Reg (&sums)[Rows][Registers], const T* bias, Y* y, int64_t y_stride,
                int num_columns) {
  for (int c = 0; c < Registers; ++c) {
    const int count = std::min(V::kWidth, num_columns - c * V::kWidth);
    if (count <= 0) return;
    const bool whole = count == V::kWidth;
    const auto offset = bias == nullptr ? V::set1(0.0f)
                        : whole         ? V::load(bias + c * V::kWidth)
                                        : V::load_first(bias + c * V::kWidth, count);
    for (int r = 0; r < Rows; ++r) {
      const auto value = bias == nullptr ? sums[r][c] : V::add(sums[r][c], offset);
      Y* const out = y + r * y_stride + c * V::kWidth;
      if (whole) {
        V::store(out, value);
      } else {
        V::store_first(out, count, value);
      }
    }
  }
}

// y [Rows, num_columns] = x [Rows, in_features] times `Registers` registers' worth of a panel's columns.
// x, w, bias and y point at the tile's first element; num_columns may be less than the registers hold.
template <class Step, class Y, int Rows, int Registers>
void linear_tile(const PackedLinear& op, const typename Step::Element* x, const typename Step::Element* w,
                 const typename Step::Element* bias, Y* y, int num_columns, Prefetch prefetch) {
  using V = typename Step::Vector;
  using T = typename Step::Element;
  typename V::Reg sums[Rows][Registers];
  for (auto& row : sums) {
    for (auto& sum : row) sum = V::set1(0.0f);
  }
  constexpr int kStep = kPanelWidth * Step::kGroup;
  const int64_t whole_steps = op.in_features / Step::kGroup;
  for (int64_t k = 0; k < whole_steps; ++k) {
    __builtin_prefetch(prefetch.next, 0, 2);
    __builtin_prefetch(prefetch.next + kCacheLine, 0, 2);
    prefetch.next += prefetch.step;
    Step::template run<Rows, Registers>(x + k * Step::kGroup, op.x_row_stride, w + k * kStep, sums);
  }
  if (whole_steps * Step::kGroup < op.in_features) {
    T last[Rows][Step::kGroup] = {};  // zero beside the last input: what follows it in memory may be a NaN
    for (int r = 0; r < Rows; ++r) last[r][0] = x[r * op.x_row_stride + op.in_features - 1];
    Step::template run<Rows, Registers>(&last[0][0], Step::kGroup, w + whole_steps * kStep, sums);
  }
  store_tile<V>(sums, bias, y, op.y_row_stride, num_columns);
}

template <class Step, class Y, int Registers, int... Rows>
auto tile_function(int rows, std::integer_sequence<int, Rows...>) {
  using T = typename Step::Element;
  using Tile = void (*)(const PackedLinear&, const T*, const T*, const T*, Y*, int, Prefetch);
  static constexpr Tile kTiles[] = {&linear_tile<Step, Y, Rows + 1, Registers>...};
  return kTiles[rows - 1];
}

// A task, tile by tile: a panel's weights stay in the nearest cache while the task's rows pass.
template <class Step, class Y, int Registers>
void run_task(const PackedLinear& op, const LinearTask& task) {
  using V = typename Step::Vector;
  using T = typename Step::Element;
  constexpr auto kRows = std::make_integer_sequence<int, V::kMaxRows>();
  constexpr int kColumns = Registers * V::kWidth;
  constexpr int64_t kStepBytes = kPanelWidth * Step::kGroup * sizeof(T);
  const T* const x = static_cast<const T*>(op.x);
  const T* const bias = static_cast<const T*>(op.bias);
  Y* const y = static_cast<Y*>(op.y);
  const int64_t size = panel_size(op.in_features, op.dtype);
  const int64_t num_tiles = (task.row_end - task.row_begin + V::kMaxRows - 1) / V::kMaxRows;
  for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
    const T* const w = static_cast<const T*>(op.packed) + panel * size;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t row = task.row_begin + tile * V::kMaxRows;
      const int rows = static_cast<int>(std::min<int64_t>(V::kMaxRows, task.row_end - row));
      const auto function = tile_function<Step, Y, Registers>(rows, kRows);
      const Prefetch prefetch =
          plan_prefetch(reinterpret_cast<const char*>(w), size * sizeof(T), kStepBytes, tile, num_tiles);
      for (int c = 0; c < kPanelWidth; c += kColumns) {
        const int64_t column = panel * kPanelWidth + c;
        if (column >= op.out_features) break;
        const int num_columns = static_cast<int>(std::min<int64_t>(kColumns, op.out_features - column));
        function(op, x + row * op.x_row_stride, w + c * Step::kGroup, bias == nullptr ? nullptr : bias + column,
                 y + row * op.y_row_stride + column, num_columns, prefetch);
      }
    }
  }
}

template <class Step, int Registers>
void run_task(const PackedLinear& op, const LinearTask& task) {
  if (op.y_dtype == op.dtype) {
    run_task<Step, typename Step::Element, Registers>(op, task);
  } else {
    run_task<Step, float, Registers>(op, task);
  }
}

// `Bf16Step`: how this instruction set multiplies bfloat16.
template <class V, class Bf16Step, int Registers>
void run_linear(const PackedLinear& op, const LinearTask& task) {
  switch (op.dtype) {
    case DType::kFloat32:
      return run_task<MultiplyStep<V, float>, Registers>(op, task);
    case DType::kBFloat16:
      return run_task<Bf16Step, Registers>(op, task);
    case DType::kFloat16:
      return run_task<MultiplyStep<V, Float16>, Registers>(op, task);
  }
}

}  // namespace
}  // namespace pagedcore::cpu
