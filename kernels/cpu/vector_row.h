// Going through a row of any length in registers.
#pragma once

#include <cstdint>

namespace pagedcore::cpu {
namespace {

// A register's worth of a row: all its lanes, or the first `count` at the row's end (the others then load as zero and
// are not stored).
template <class V>
struct RowPart {
  int64_t offset;
  int count;

  template <class T>
  typename V::Reg load(const T* row) const {
    return count == V::kWidth ? V::load(row + offset) : V::load_first(row + offset, count);
  }
  template <class T>
  void store(T* row, typename V::Reg value) const {
    if (count == V::kWidth) {
      V::store(row + offset, value);
    } else {
      V::store_first(row + offset, count, value);
    }
  }
  // `value` with zero in the lanes beyond the row's end, so that a sum over all lanes is one over the row.
  typename V::Reg zero_beyond(typename V::Reg value) const {
    if (count == V::kWidth) return value;
    float lanes[V::kWidth];
    V::store(lanes, value);
    return V::load_first(lanes, count);
  }
};

template <class V, class Body>
void for_each_part(int64_t size, const Body& body) {
  int64_t offset = 0;
  for (; offset + V::kWidth <= size; offset += V::kWidth) body(RowPart<V>{offset, V::kWidth});
  if (offset < size) body(RowPart<V>{offset, static_cast<int>(size - offset)});
}

}  // namespace
}  // namespace pagedcore::cpu
