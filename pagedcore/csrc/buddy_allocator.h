// Contiguous ranges of blocks by the buddy system (Knuth, The Art of Computer Programming, volume 1, section 2.5).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <set>
#include <vector>

#include "block_pool.h"

namespace pagedcore {

// Hands out ranges whose length is a power of two and whose first block is a multiple of that length.
//
// A pool that is no power of two is a row of such ranges, the longest first. Invariants, examined by check_integrity():
// every block is in exactly one range, free or taken; no two free ranges are buddies of equal length (they would have
// been joined).
class BuddyAllocator {
 public:
  explicit BuddyAllocator(int32_t num_blocks);

  // The first block of a range of the smallest power of two that is at least `num_blocks` (1 or more), taken from the
  // shortest free range that is long enough, at the lowest address. Empty: no such range.
  std::optional<BlockId> take(int64_t num_blocks);

  // Hand back the range that starts at `first`; it is joined with its buddy for as long as that is free.
  void give_back(BlockId first);

  int32_t num_free() const { return num_free_; }
  // Length of the range that starts at `first`.
  int32_t length(BlockId first) const { return int32_t{1} << order_of_taken_[first]; }

  // Throws std::runtime_error naming the violated invariant.
  void check_integrity() const;

 private:
  static constexpr int kNumOrders = 31;
  static constexpr int8_t kNotTaken = -1;

  std::array<std::set<BlockId>, kNumOrders> free_;  // first blocks of the free ranges of 2^order blocks
  std::vector<int8_t> order_of_taken_;              // [num_blocks] of the range that starts here, or kNotTaken
  int32_t num_free_;
};

}  // namespace pagedcore
