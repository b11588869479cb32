#include "buddy_allocator.h"

#include <bit>

#include "check.h"

namespace pagedcore {

BuddyAllocator::BuddyAllocator(int32_t num_blocks) : order_of_taken_(num_blocks, kNotTaken), num_free_(num_blocks) {
  for (uint32_t first = 0, rest = num_blocks; rest > 0;) {
    const uint32_t length = std::bit_floor(rest);
    free_[std::countr_zero(length)].insert(static_cast<BlockId>(first));
    first += length;
    rest -= length;
  }
}

std::optional<BlockId> BuddyAllocator::take(int64_t num_blocks) {
  const int wanted = std::bit_width(static_cast<uint64_t>(num_blocks - 1));
  int order = wanted;
  while (order < kNumOrders && free_[order].empty()) ++order;
  if (order >= kNumOrders) return std::nullopt;
  const BlockId first = *free_[order].begin();
  free_[order].erase(free_[order].begin());
  while (order > wanted) {
    --order;
    free_[order].insert(first + (BlockId{1} << order));
  }
  order_of_taken_[first] = static_cast<int8_t>(wanted);
  num_free_ -= BlockId{1} << wanted;
  return first;
}

void BuddyAllocator::give_back(BlockId first) {
  int order = order_of_taken_[first];
  check(order != kNotTaken, "a range is given back that was not taken");
  order_of_taken_[first] = kNotTaken;
  num_free_ += BlockId{1} << order;
  // Behind the end of the pool there is no free range, so nothing is joined with what does not exist.
  while (free_[order].erase(first ^ (BlockId{1} << order)) == 1) {
    first &= ~(BlockId{1} << order);
    ++order;
  }
  free_[order].insert(first);
}

void BuddyAllocator::check_integrity() const {
  std::vector<int32_t> covered(order_of_taken_.size(), 0);
  const auto cover = [&covered](BlockId first, int order) {
    check(first % (BlockId{1} << order) == 0, "a range does not start at a multiple of its length");
    for (BlockId block = first; block < first + (BlockId{1} << order); ++block) ++covered.at(block);
  };
  int64_t num_free = 0;
  for (int order = 0; order < kNumOrders; ++order) {
    for (const BlockId first : free_[order]) {
      cover(first, order);
      num_free += BlockId{1} << order;
      check(!free_[order].contains(first ^ (BlockId{1} << order)), "two free buddies are not joined");
    }
  }
  for (size_t block = 0; block < order_of_taken_.size(); ++block) {
    if (order_of_taken_[block] != kNotTaken) cover(static_cast<BlockId>(block), order_of_taken_[block]);
  }
  for (const int32_t times : covered) check(times == 1, "a block is not in exactly one range, free or taken");
  check(num_free == num_free_, "the number of free blocks is not that of the free ranges");
}

}  // namespace pagedcore
