// Reference counts and the free list of a fixed number of KV-cache blocks.
#pragma once

#include <cstdint>
#include <vector>

namespace pagedcore {

using BlockId = int32_t;
inline constexpr BlockId kNoBlock = -1;

// Knows which blocks are free, and nothing of what they hold.
//
// A block is either in use (reference count above zero) or on the free list, never both. The free list is a circular
// doubly linked list through the blocks themselves, so taking a block, handing it back and pulling one out of the
// middle (a prefix-cache hit) cost the same few stores and never allocate.
//
// The front of the list is taken next. Blocks whose contents nobody wants go to the front; blocks whose contents may be
// wanted again
// ("retained": they are registered in the prefix cache) go to the back. Hence the list always reads
//
//     unwanted ... unwanted | retained, least recently used ... retained, most recently used
//
// and taking from the front evicts a cached block only when no other block is left, the least recently used one first.
class BlockPool {
 public:
  explicit BlockPool(int32_t num_blocks);

  int32_t num_blocks() const { return sentinel_; }
  int32_t num_free() const { return num_free_; }
  int32_t ref_count(BlockId block) const { return nodes_[block].ref_count; }

  // The block at the front, with one reference. There must be a free block.
  BlockId take();

  // One more reference; a free block leaves the free list with its contents as they are.
  void add_ref(BlockId block);

  // One reference less. The last one puts the block on the free list: at the back if `retain`, else at the front.
  void drop_ref(BlockId block, bool retain);

  // The free blocks in the order in which they would be taken. Throws std::runtime_error if the list is broken.
  std::vector<BlockId> free_list() const;

 private:
  struct Node {
    BlockId prev;
    BlockId next;
    int32_t ref_count;
  };

  void link_before(BlockId block, BlockId successor);
  void unlink(BlockId block);

  const BlockId sentinel_;   // index of the list's head node, one behind the last block
  std::vector<Node> nodes_;  // [num_blocks + 1]
  int32_t num_free_ = 0;
};

}  // namespace pagedcore
