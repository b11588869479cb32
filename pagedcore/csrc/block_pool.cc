#include "block_pool.h"

#include "check.h"

namespace pagedcore {

BlockPool::BlockPool(int32_t num_blocks) : sentinel_(num_blocks), nodes_(static_cast<size_t>(num_blocks) + 1) {
  nodes_[sentinel_] = {sentinel_, sentinel_, 0};
  for (BlockId block = 0; block < num_blocks; ++block) {
    nodes_[block].ref_count = 0;
    link_before(block, sentinel_);
  }
}

BlockId BlockPool::take() {
  const BlockId block = nodes_[sentinel_].next;
  check(block != sentinel_, "take() needs a free block");
  unlink(block);
  nodes_[block].ref_count = 1;
  return block;
}

void BlockPool::add_ref(BlockId block) {
  if (nodes_[block].ref_count++ == 0) unlink(block);
}

void BlockPool::drop_ref(BlockId block, bool retain) {
  check(nodes_[block].ref_count > 0, "drop_ref() needs a block in use");
  if (--nodes_[block].ref_count == 0) link_before(block, retain ? sentinel_ : nodes_[sentinel_].next);
}

std::vector<BlockId> BlockPool::free_list() const {
  std::vector<BlockId> blocks;
  for (BlockId block = nodes_[sentinel_].next; block != sentinel_; block = nodes_[block].next) {
    check(blocks.size() < static_cast<size_t>(num_free_),
          "the free list is longer than the number of free blocks, or has a cycle");
    check(nodes_[nodes_[block].prev].next == block && nodes_[nodes_[block].next].prev == block,
          "a link of the free list is one-way");
    check(nodes_[block].ref_count == 0, "a block on the free list is in use");
    blocks.push_back(block);
  }
  check(blocks.size() == static_cast<size_t>(num_free_), "the free list is shorter than the number of free blocks");
  return blocks;
}

void BlockPool::link_before(BlockId block, BlockId successor) {
  const BlockId predecessor = nodes_[successor].prev;
  nodes_[block].prev = predecessor;
  nodes_[block].next = successor;
  nodes_[predecessor].next = block;
  nodes_[successor].prev = block;
  ++num_free_;
}

void BlockPool::unlink(BlockId block) {
  const Node& node = nodes_[block];
  nodes_[node.prev].next = node.next;
  nodes_[node.next].prev = node.prev;
  --num_free_;
}

}  // namespace pagedcore
