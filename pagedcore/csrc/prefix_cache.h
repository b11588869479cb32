// The prefix cache: finds the block that holds the K/V of given tokens behind a given prefix.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "block_pool.h"

namespace pagedcore {

// Names a cached prefix. Ids only count up and are never used again, so the id of an evicted entry matches nothing, for
// ever.
using PrefixId = uint64_t;
inline constexpr PrefixId kNoPrefix = 0;

// The empty prefix under one salt. Equal salts share a root for as long as anyone holds it.
struct PrefixRoot {
  std::string salt;
  PrefixId id;
};

// A forest of full blocks: one tree for each salt, the path from the root to a block spelling the tokens of a prefix.
//
// An entry belongs to one block and a block has at most one entry, so entries are stored by block and nothing is
// allocated after construction. An entry is found by (id of the parent entry, the block's tokens): the hash of both
// picks the bucket, and a hit compares both in full. By induction a hit means that the whole prefix and the salt are
// equal, whatever the hash does; a collision costs one comparison. An entry whose parent was erased can never be found
// again and waits for its eviction.
class PrefixCache {
 public:
  // `hash_bits` keeps only so many bits of the hash, so that tests can force collisions.
  PrefixCache(int32_t num_blocks, int32_t block_size, int32_t hash_bits);
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // The root of a salt. Holders share it; the last one to let go forgets the salt. Must not outlive the cache.
  std::shared_ptr<const PrefixRoot> root(const std::string& salt);

  // The block that holds `tokens` ([block_size]) behind the prefix `parent`, or kNoBlock.
  BlockId find(PrefixId parent, std::span<const int32_t> tokens) const;

  // Register `block`, which must have no entry. `root` is kept alive by the entry; it is null unless `parent` is a
  // root's id.
  void insert(BlockId block, PrefixId parent, std::shared_ptr<const PrefixRoot> root, std::span<const int32_t> tokens);

  void erase(BlockId block);

  bool contains(BlockId block) const { return entries_[block].id != kNoPrefix; }
  bool holds(BlockId block, std::span<const int32_t> tokens) const;  // behind whatever prefix
  PrefixId id(BlockId block) const { return entries_[block].id; }    // kNoPrefix: not registered
  int32_t size() const { return size_; }

  // Throws std::runtime_error naming the violated invariant.
  void check_integrity() const;

 private:
  struct Entry {
    PrefixId id = kNoPrefix;
    PrefixId parent = kNoPrefix;
    uint64_t hash = 0;
    BlockId next_in_bucket = kNoBlock;
    std::shared_ptr<const PrefixRoot> root;
  };

  uint64_t hash(PrefixId parent, std::span<const int32_t> tokens) const;
  std::span<const int32_t> tokens(BlockId block) const;

  const int32_t block_size_;
  const uint64_t hash_mask_;
  // Before `entries_`: an entry that goes away may be the last holder of its root, which then leaves this map.
  std::unordered_map<std::string, std::weak_ptr<const PrefixRoot>> roots_;
  std::vector<Entry> entries_;    // [num_blocks]
  std::vector<int32_t> tokens_;   // [num_blocks, block_size]
  std::vector<BlockId> buckets_;  // a power of two of them; first block of each
  PrefixId next_id_ = kNoPrefix + 1;
  int32_t size_ = 0;
};

}  // namespace pagedcore
