#include "contiguous_manager.h"

#include <bit>
#include <stdexcept>

#include "check.h"

namespace pagedcore {

ContiguousManager::ContiguousManager(int64_t num_blocks, int64_t block_size)
    : BlockManager({.num_blocks = num_blocks, .block_size = block_size, .enable_prefix_caching = false}),
      buddy_(BlockManager::num_blocks()) {}

void ContiguousManager::fork(SequenceId, SequenceId) {
  throw std::invalid_argument("a contiguous reservation cannot be shared: add a sequence of its own instead");
}

void ContiguousManager::release(SequenceId id) {
  const auto blocks = block_table(id);
  if (!blocks.empty()) buddy_.give_back(blocks.front());
  BlockManager::release(id);
}

bool ContiguousManager::grow(SequenceId id, int64_t num_tokens, int64_t write_from) {
  Sequence& seq = resident(id);
  if (write_from < 0 || write_from > num_tokens) throw std::invalid_argument("write_from must be in [0, num_tokens]");
  const int64_t num_needed = blocks_needed(num_tokens);
  if (num_needed <= std::ssize(seq.blocks)) return true;
  if (!seq.blocks.empty()) return false;
  const std::optional<BlockId> first = buddy_.take(num_needed);
  if (!first) return false;
  const int32_t length = buddy_.length(*first);
  seq.blocks.reserve(length);
  for (BlockId block = *first; block < *first + length; ++block) claim(seq, block);
  return true;
}

int64_t ContiguousManager::max_blocks_per_sequence() const {
  return std::bit_floor(static_cast<uint64_t>(num_blocks()));
}

void ContiguousManager::check_integrity() const {
  BlockManager::check_integrity();
  buddy_.check_integrity();
  check(buddy_.num_free() == num_free_blocks(), "the buddy system and the pool disagree on the number of free blocks");
}

}  // namespace pagedcore
