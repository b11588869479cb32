// The block tables of all sequences over one pool of KV-cache blocks (PagedAttention, Kwon et al. 2023,
// sections 4.2-4.5).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "block_pool.h"
#include "prefix_cache.h"

namespace pagedcore {

using SequenceId = int64_t;

// A block to copy: within the device's cache, or between the device and the host.
struct BlockCopy {
  BlockId src;
  BlockId dst;
};

// A block of the device and the block of the host it is swapped to or from.
struct SwapPair {
  BlockId device;
  BlockId host;
};

// Owns which block holds which part of which sequence; it never touches the K/V itself.
//
// Invariants, all of them examined by check_integrity():
//   - The reference count of a block is the number of block tables it is in plus the number of pending copies that read
//   it.
//   - A block without references is on the free list; a registered one (prefix cache) behind all that are not.
//   - Pending copies are independent of each other: no block is written by two or both read and written, so they may
//   run in any order
//     or at once. The block written is in a block table.
//   - A swapped-out sequence owns host blocks only. Those swapped out together share host blocks as they shared the
//     device's.
//
// A "no room" is a return value and leaves everything as it was. Misuse throws: UnknownSequence for an id that was not
// added, std::invalid_argument otherwise. Not thread-safe.
//
// The caller carries out what the manager decides, in this order: swaps in the order of their calls, then the pending
// copies, then the writes of the step.
class BlockManager {
 public:
  struct Options {
    int64_t num_blocks;
    int64_t block_size;
    int64_t num_host_blocks = 0;
    bool enable_prefix_caching = true;
    int64_t hash_bits = 64;
  };

  explicit BlockManager(const Options& options);
  virtual ~BlockManager() = default;

  void add(SequenceId id);
  virtual void fork(SequenceId parent, SequenceId child);
  virtual void release(SequenceId id);
  bool has(SequenceId id) const { return sequences_.contains(id); }

  // Attach the longest cached prefix of `tokens` in whole blocks, at most `max_tokens` of it. Returns its length in
  // tokens.
  int64_t match_prefix(SequenceId id, std::span<const int32_t> tokens, int64_t max_tokens, const std::string& salt);

  // Room for `num_tokens`, and sole ownership of every block with a slot in [write_from, num_tokens). False: no room.
  virtual bool grow(SequenceId id, int64_t num_tokens, int64_t write_from);

  // Register the blocks full of computed tokens.
  void commit(SequenceId id, std::span<const int32_t> tokens, int64_t num_computed);

  // Move the blocks of some sequences to the host or back; a block that several of them share is moved once and shared
  // again. Empty optional: no room.
  std::optional<std::vector<SwapPair>> swap_out(std::span<const SequenceId> ids);
  std::optional<std::vector<SwapPair>> swap_in(std::span<const SequenceId> ids);

  // The blocks that some sequences hold between them, and how many of those nobody else holds.
  struct Holding {
    int64_t num_blocks;
    int64_t num_exclusive;
  };
  Holding holding(std::span<const SequenceId> ids) const;

  // Forget every cached prefix; live sequences keep their blocks, and what they compute is not registered any more.
  void reset_prefix_cache();

  // Throws std::runtime_error naming the violated invariant.
  virtual void check_integrity() const;

  std::span<const BlockId> block_table(SequenceId id) const { return resident(id).blocks; }
  // Whether one sequence alone owns the block and no cached prefix is in it.
  bool writable(BlockId block) const { return num_owners(block) == 1 && !cache_.contains(block); }
  std::span<const BlockCopy> pending_copies() const { return copies_; }
  void clear_pending_copies();

  int64_t blocks_needed(int64_t num_tokens) const { return num_tokens / block_size_ + (num_tokens % block_size_ != 0); }
  // The most blocks that one sequence can have, alone in the pool.
  virtual int64_t max_blocks_per_sequence() const { return num_blocks(); }
  int32_t num_blocks() const { return pool_.num_blocks(); }
  int32_t block_size() const { return block_size_; }
  int32_t num_free_blocks() const { return pool_.num_free(); }
  int32_t num_cached_blocks() const { return cache_.size(); }
  int64_t num_evictions() const { return num_evictions_; }
  int32_t num_host_blocks() const { return host_pool_.num_blocks(); }
  int32_t num_free_host_blocks() const { return host_pool_.num_free(); }

 protected:
  struct Sequence {
    std::vector<BlockId> blocks;  // of the device, or of the host while swapped out
    bool swapped_out = false;
    std::shared_ptr<const PrefixRoot> root;  // null: nothing of this sequence is registered (any more)
    PrefixId prefix = kNoPrefix;             // of the first `num_committed` blocks
    BlockId prefix_block = kNoBlock;         // the block registered as `prefix`; kNoBlock: it is the root
    int64_t num_committed = 0;               // blocks
  };

  const Sequence& resident(SequenceId id) const;  // refuses one that is swapped out
  Sequence& resident(SequenceId id);

  // Append a free block of the caller's choice to a block table.
  void claim(Sequence& seq, BlockId block) {
    pool_.add_ref(block);
    seq.blocks.push_back(block);
  }

 private:
  const Sequence& sequence(SequenceId id) const;
  Sequence& sequence(SequenceId id);

  // References from block tables. Those of pending copies do not count: a copy reads its source before the step writes.
  int32_t num_owners(BlockId block) const { return pool_.ref_count(block) - num_readers_[block]; }
  // Where the contents of a block lie until the pending copies are done.
  BlockId contents_of(BlockId block) const { return copy_into_[block] < 0 ? block : copies_[copy_into_[block]].src; }

  BlockId take_block();
  void drop_block(BlockId block);
  void drop_table(std::vector<BlockId>& blocks);
  void make_writable(BlockId& block);
  void add_copy(BlockId src, BlockId dst);
  void cancel_copy(BlockId dst);
  void release_reader(BlockId src);

  void check_references() const;
  void check_free_list() const;
  void check_copies() const;

  const int32_t block_size_;
  const bool enable_prefix_caching_;
  BlockPool pool_;
  BlockPool host_pool_;
  PrefixCache cache_;
  std::unordered_map<SequenceId, Sequence> sequences_;  // behind `cache_`, which outlives the roots they hold
  std::vector<BlockCopy> copies_;                       // pending
  std::vector<int32_t> copy_into_;                      // [num_blocks] index of the pending copy into this block, or -1
  std::vector<int32_t> num_readers_;                    // [num_blocks] pending copies from this block
  int64_t num_evictions_ = 0;
};

}  // namespace pagedcore
