// The memory policy that PagedAttention replaces: a contiguous reservation for each sequence (Kwon et al. 2023,
// section 3.1 and the Orca baselines of section 6.1).
#pragma once

#include "block_manager.h"
#include "buddy_allocator.h"

namespace pagedcore {

// A block manager whose block tables are runs of consecutive blocks, so that kernels and scheduler are the same and
// only the memory policy differs.
//
// The first grow of a sequence reserves, by the buddy system, all it will ever have; a later one only looks whether
// that is enough. Nothing is shared, cached or swapped: a reservation belongs to one sequence until its release.
class ContiguousManager : public BlockManager {
 public:
  ContiguousManager(int64_t num_blocks, int64_t block_size);

  // Throws std::invalid_argument: a reservation cannot be shared.
  void fork(SequenceId parent, SequenceId child) override;
  void release(SequenceId id) override;
  bool grow(SequenceId id, int64_t num_tokens, int64_t write_from) override;
  void check_integrity() const override;

  int64_t max_blocks_per_sequence() const override;

 private:
  BuddyAllocator buddy_;
};

}  // namespace pagedcore
