#include "prefix_cache.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "check.h"
#include "token_hash.h"

namespace pagedcore {

PrefixCache::PrefixCache(int32_t num_blocks, int32_t block_size, int32_t hash_bits)
    : block_size_(block_size),
      hash_mask_(~uint64_t{0} >> (64 - hash_bits)),
      entries_(num_blocks),
      tokens_(static_cast<size_t>(num_blocks) * block_size),
      buckets_(std::bit_ceil(static_cast<size_t>(num_blocks)), kNoBlock) {}

std::shared_ptr<const PrefixRoot> PrefixCache::root(const std::string& salt) {
  std::weak_ptr<const PrefixRoot>& known = roots_[salt];
  std::shared_ptr<const PrefixRoot> root = known.lock();
  if (!root) {
    root = std::shared_ptr<const PrefixRoot>(new PrefixRoot{salt, next_id_++}, [this](const PrefixRoot* last) {
      roots_.erase(last->salt);
      delete last;
    });
    known = root;
  }
  return root;
}

BlockId PrefixCache::find(PrefixId parent, std::span<const int32_t> tokens) const {
  const uint64_t wanted = hash(parent, tokens);
  BlockId block = buckets_[wanted & (buckets_.size() - 1)];
  while (block != kNoBlock) {
    const Entry& entry = entries_[block];
    if (entry.hash == wanted && entry.parent == parent && std::ranges::equal(this->tokens(block), tokens)) return block;
    block = entry.next_in_bucket;
  }
  return kNoBlock;
}

void PrefixCache::insert(BlockId block, PrefixId parent, std::shared_ptr<const PrefixRoot> root,
                         std::span<const int32_t> tokens) {
  Entry& entry = entries_[block];
  check(entry.id == kNoPrefix, "a block can have one entry in the prefix cache");
  entry.id = next_id_++;
  entry.parent = parent;
  entry.root = std::move(root);
  entry.hash = hash(parent, tokens);
  std::ranges::copy(tokens, tokens_.begin() + static_cast<ptrdiff_t>(block) * block_size_);
  BlockId& bucket = buckets_[entry.hash & (buckets_.size() - 1)];
  entry.next_in_bucket = bucket;
  bucket = block;
  ++size_;
}

bool PrefixCache::holds(BlockId block, std::span<const int32_t> tokens) const {
  return contains(block) && std::ranges::equal(this->tokens(block), tokens);
}

void PrefixCache::erase(BlockId block) {
  Entry& entry = entries_[block];
  check(entry.id != kNoPrefix, "only a registered block can leave the prefix cache");
  BlockId* link = &buckets_[entry.hash & (buckets_.size() - 1)];
  while (*link != block) link = &entries_[*link].next_in_bucket;
  *link = entry.next_in_bucket;
  entry = Entry{};
  --size_;
}

void PrefixCache::check_integrity() const {
  int32_t reached = 0;
  for (size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    for (BlockId block = buckets_[bucket]; block != kNoBlock; block = entries_[block].next_in_bucket) {
      const Entry& entry = entries_[block];
      check(++reached <= size_, "the prefix cache's buckets hold more entries than it has, or one has a cycle");
      check(entry.id != kNoPrefix && entry.id < next_id_,
            "a bucket of the prefix cache holds a block without an entry");
      check(entry.hash == hash(entry.parent, tokens(block)),
            "a prefix-cache entry's hash is not that of its parent and tokens");
      check((entry.hash & (buckets_.size() - 1)) == bucket, "a prefix-cache entry is in the wrong bucket");
      check(!entry.root || entry.root->id == entry.parent, "a prefix-cache entry holds a root that is not its parent");
      check(find(entry.parent, tokens(block)) == block, "the prefix cache holds the same prefix twice");
    }
  }
  check(reached == size_, "the prefix cache's buckets hold fewer entries than it has");
  int32_t registered = 0;
  for (const Entry& entry : entries_) {
    registered += entry.id != kNoPrefix;
    check(entry.id != kNoPrefix || !entry.root, "a block that is not registered holds a root");
  }
  check(registered == size_, "the prefix cache's size is not the number of registered blocks");
  for (const auto& [salt, root] : roots_) check(!root.expired(), "the prefix cache remembers a salt that nobody uses");
}

uint64_t PrefixCache::hash(PrefixId parent, std::span<const int32_t> tokens) const {
  return hash_tokens(parent, tokens) & hash_mask_;
}

std::span<const int32_t> PrefixCache::tokens(BlockId block) const {
  return {tokens_.data() + static_cast<size_t>(block) * block_size_, static_cast<size_t>(block_size_)};
}

}  // namespace pagedcore
