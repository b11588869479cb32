#include "block_manager.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "check.h"

namespace pagedcore {
namespace {

void require(bool condition, const char* text) {
  if (!condition) [[unlikely]]
    throw std::invalid_argument(text);
}

void require(bool condition, SequenceId id, const char* text) {
  if (!condition) [[unlikely]]
    throw std::invalid_argument("sequence " + std::to_string(id) + " " + text);
}

int32_t in_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw std::invalid_argument(std::string(name) + " must be in [" + std::to_string(low) + ", " +
                                std::to_string(high) + "], got " + std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

std::span<const SequenceId> distinct(std::span<const SequenceId> ids) {
  std::unordered_set<SequenceId> seen;
  for (const SequenceId id : ids) require(seen.insert(id).second, id, "is named twice");
  return ids;
}

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

}  // namespace

BlockManager::BlockManager(const Options& options)
    : block_size_(in_range("block_size", options.block_size, 1, kMaxInt32)),
      enable_prefix_caching_(options.enable_prefix_caching),
      // A slot number (block * block_size + offset) must fit an int32.
      pool_(in_range("num_blocks", options.num_blocks, 1, kMaxInt32 / block_size_)),
      host_pool_(in_range("num_host_blocks", options.num_host_blocks, 0, kMaxInt32 / block_size_)),
      cache_(pool_.num_blocks(), block_size_, in_range("hash_bits", options.hash_bits, 1, 64)),
      copy_into_(pool_.num_blocks(), -1),
      num_readers_(pool_.num_blocks(), 0) {}

// ---------------------------------------------------------------------------------------------------- sequences

void BlockManager::add(SequenceId id) { require(sequences_.try_emplace(id).second, id, "was added before"); }

void BlockManager::fork(SequenceId parent, SequenceId child) {
  require(!has(child), child, "was added before");
  Sequence copy = sequence(parent);
  for (const BlockId block : copy.blocks) (copy.swapped_out ? host_pool_ : pool_).add_ref(block);
  sequences_.emplace(child, std::move(copy));
}

void BlockManager::release(SequenceId id) {
  Sequence& seq = sequence(id);
  if (seq.swapped_out) {
    for (const BlockId block : seq.blocks) host_pool_.drop_ref(block, false);
  } else {
    drop_table(seq.blocks);
  }
  sequences_.erase(id);
}

const BlockManager::Sequence& BlockManager::sequence(SequenceId id) const {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) throw UnknownSequence("no sequence " + std::to_string(id));
  return found->second;
}

BlockManager::Sequence& BlockManager::sequence(SequenceId id) {
  return const_cast<Sequence&>(std::as_const(*this).sequence(id));
}

const BlockManager::Sequence& BlockManager::resident(SequenceId id) const {
  const Sequence& seq = sequence(id);
  require(!seq.swapped_out, id, "is swapped out");
  return seq;
}

BlockManager::Sequence& BlockManager::resident(SequenceId id) {
  return const_cast<Sequence&>(std::as_const(*this).resident(id));
}

// ------------------------------------------------------------------------------------------------- prefix cache

int64_t BlockManager::match_prefix(SequenceId id, std::span<const int32_t> tokens, int64_t max_tokens,
                                   const std::string& salt) {
  Sequence& seq = resident(id);
  require(seq.blocks.empty(), id, "has blocks: match_prefix comes before them");
  require(max_tokens >= 0, "max_tokens must not be negative");
  if (!enable_prefix_caching_) return 0;
  seq.root = cache_.root(salt);
  seq.prefix = seq.root->id;
  const int64_t limit = std::min<int64_t>(max_tokens, std::ssize(tokens)) / block_size_;
  while (seq.num_committed < limit) {
    const BlockId block = cache_.find(seq.prefix, tokens.subspan(seq.num_committed * block_size_, block_size_));
    if (block == kNoBlock) break;
    claim(seq, block);
    seq.prefix = cache_.id(block);
    seq.prefix_block = block;
    ++seq.num_committed;
  }
  return seq.num_committed * block_size_;
}

void BlockManager::commit(SequenceId id, std::span<const int32_t> tokens, int64_t num_computed) {
  Sequence& seq = resident(id);
  require(num_computed >= 0 && num_computed <= std::ssize(seq.blocks) * block_size_,
          "num_computed is outside the sequence's blocks");
  if (!seq.root) return;
  const int64_t limit = std::min<int64_t>(num_computed, std::ssize(tokens)) / block_size_;
  const auto tokens_of = [&](int64_t i) { return tokens.subspan(i * block_size_, block_size_); };
  for (int64_t i = seq.num_committed; i < limit; ++i) {
    require(!cache_.contains(seq.blocks[i]) || cache_.holds(seq.blocks[i], tokens_of(i)),
            "the tokens are not those that a shared block was committed with");
  }
  for (; seq.num_committed < limit; ++seq.num_committed) {
    // The prefix may hang on another sequence's block with equal contents, and that one may have been evicted: a child
    // of it could never be found.
    if (seq.prefix_block != kNoBlock && cache_.id(seq.prefix_block) != seq.prefix) {
      seq.root.reset();
      return;
    }
    const auto block_tokens = tokens_of(seq.num_committed);
    BlockId block = cache_.find(seq.prefix, block_tokens);
    if (block == kNoBlock) {
      block = seq.blocks[seq.num_committed];
      if (cache_.contains(block)) {
        // A fork registered it behind an equal prefix that has been evicted since.
        seq.root.reset();
        return;
      }
      cache_.insert(block, seq.prefix, seq.num_committed == 0 ? seq.root : nullptr, block_tokens);
    }
    seq.prefix = cache_.id(block);
    seq.prefix_block = block;
  }
}

void BlockManager::reset_prefix_cache() {
  for (auto& [id, seq] : sequences_) seq.root.reset();
  for (BlockId block = 0; block < pool_.num_blocks(); ++block) {
    if (cache_.contains(block)) cache_.erase(block);
  }
}

// ------------------------------------------------------------------------------------------------------- growth

bool BlockManager::grow(SequenceId id, int64_t num_tokens, int64_t write_from) {
  Sequence& seq = resident(id);
  require(write_from >= 0 && write_from <= num_tokens, "write_from must be in [0, num_tokens]");
  const int64_t num_owned = std::ssize(seq.blocks);
  const int64_t num_new = std::max<int64_t>(blocks_needed(num_tokens) - num_owned, 0);
  // The blocks it has already that will be written: [first_written, end_written).
  const int64_t first_written = write_from / block_size_;
  const int64_t end_written = write_from < num_tokens ? std::min(num_owned, blocks_needed(num_tokens)) : first_written;

  int64_t num_copies = 0;
  for (int64_t i = first_written; i < end_written; ++i) num_copies += num_owners(seq.blocks[i]) > 1;
  if (num_new + num_copies > pool_.num_free()) return false;

  for (int64_t i = first_written; i < end_written; ++i) make_writable(seq.blocks[i]);
  for (int64_t i = 0; i < num_new; ++i) seq.blocks.push_back(take_block());
  // What it rewrites is no longer the committed prefix.
  if (first_written < end_written && first_written < seq.num_committed) seq.root.reset();
  return true;
}

void BlockManager::make_writable(BlockId& block) {
  if (num_owners(block) > 1) {
    const BlockId own = take_block();
    add_copy(block, own);
    drop_block(block);
    block = own;
  } else if (cache_.contains(block)) {
    cache_.erase(block);
  }
}

BlockId BlockManager::take_block() {
  const BlockId block = pool_.take();
  if (cache_.contains(block)) {
    cache_.erase(block);
    ++num_evictions_;
  }
  return block;
}

void BlockManager::drop_block(BlockId block) {
  if (num_owners(block) == 1 && copy_into_[block] >= 0) {
    cancel_copy(block);
    if (cache_.contains(block)) cache_.erase(block);  // its contents will never arrive
  }
  pool_.drop_ref(block, cache_.contains(block));
}

// From the tail: of a prefix's blocks the last ones are evicted first, as they are of no use without those before them.
void BlockManager::drop_table(std::vector<BlockId>& blocks) {
  while (!blocks.empty()) {
    drop_block(blocks.back());
    blocks.pop_back();
  }
}

// ------------------------------------------------------------------------------------------------ copy-on-write

// Keeps the copies independent: a source whose own contents are still to arrive is replaced by where they come from,
// and a source is held until it has been read, so that it cannot be handed out and become a destination.
void BlockManager::add_copy(BlockId src, BlockId dst) {
  src = contents_of(src);
  pool_.add_ref(src);
  ++num_readers_[src];
  copy_into_[dst] = static_cast<int32_t>(copies_.size());
  copies_.push_back({src, dst});
}

void BlockManager::cancel_copy(BlockId dst) {
  const int32_t index = std::exchange(copy_into_[dst], -1);
  const BlockId src = copies_[index].src;
  if (index + 1 < std::ssize(copies_)) {
    copies_[index] = copies_.back();
    copy_into_[copies_[index].dst] = index;
  }
  copies_.pop_back();
  release_reader(src);
}

void BlockManager::clear_pending_copies() {
  for (const auto& [src, dst] : copies_) {
    copy_into_[dst] = -1;
    release_reader(src);
  }
  copies_.clear();
}

void BlockManager::release_reader(BlockId src) {
  --num_readers_[src];
  pool_.drop_ref(src, cache_.contains(src));
}

// ----------------------------------------------------------------------------------------------------- swapping

std::optional<std::vector<SwapPair>> BlockManager::swap_out(std::span<const SequenceId> ids) {
  std::unordered_map<BlockId, BlockId> host_of;
  for (const SequenceId id : distinct(ids)) {
    for (const BlockId block : resident(id).blocks) host_of.try_emplace(block, kNoBlock);
  }
  if (std::ssize(host_of) > host_pool_.num_free()) return std::nullopt;
  std::vector<SwapPair> pairs;
  pairs.reserve(host_of.size());
  std::vector<std::vector<BlockId>> tables;
  for (const SequenceId id : ids) {
    std::vector<BlockId>& table = tables.emplace_back(resident(id).blocks);
    for (BlockId& block : table) {
      BlockId& host_block = host_of.at(block);
      if (host_block == kNoBlock) {
        host_block = host_pool_.take();
        pairs.push_back({contents_of(block), host_block});
      } else {
        host_pool_.add_ref(host_block);
      }
      block = host_block;
    }
  }
  // Only now: what a block waits for is forgotten when the last table lets go of it.
  for (size_t i = 0; i < ids.size(); ++i) {
    Sequence& seq = sequence(ids[i]);
    drop_table(seq.blocks);
    seq.blocks = std::move(tables[i]);
    seq.swapped_out = true;
  }
  return pairs;
}

std::optional<std::vector<SwapPair>> BlockManager::swap_in(std::span<const SequenceId> ids) {
  std::unordered_map<BlockId, BlockId> device_of;
  for (const SequenceId id : distinct(ids)) {
    const Sequence& seq = sequence(id);
    require(seq.swapped_out, id, "is not swapped out");
    for (const BlockId block : seq.blocks) device_of.try_emplace(block, kNoBlock);
  }
  if (std::ssize(device_of) > pool_.num_free()) return std::nullopt;
  std::vector<SwapPair> pairs;
  pairs.reserve(device_of.size());
  for (const SequenceId id : ids) {
    Sequence& seq = sequence(id);
    for (BlockId& host_block : seq.blocks) {
      BlockId& block = device_of.at(host_block);
      if (block == kNoBlock) {
        block = take_block();
        pairs.push_back({block, host_block});
      } else {
        pool_.add_ref(block);
      }
      host_pool_.drop_ref(std::exchange(host_block, block), false);
    }
    seq.swapped_out = false;
  }
  return pairs;
}

BlockManager::Holding BlockManager::holding(std::span<const SequenceId> ids) const {
  std::unordered_map<BlockId, int32_t> entries;
  for (const SequenceId id : distinct(ids)) {
    for (const BlockId block : resident(id).blocks) ++entries[block];
  }
  const auto is_exclusive = [this](const auto& entry) { return num_owners(entry.first) == entry.second; };
  return {std::ssize(entries), std::ranges::count_if(entries, is_exclusive)};
}

// ---------------------------------------------------------------------------------------------------- integrity

void BlockManager::check_integrity() const {
  check_references();
  check_free_list();
  check_copies();
  cache_.check_integrity();
}

void BlockManager::check_references() const {
  std::vector<int32_t> expected = num_readers_;
  std::vector<int32_t> expected_host(host_pool_.num_blocks(), 0);
  for (const auto& [id, seq] : sequences_) {
    for (const BlockId block : seq.blocks) ++(seq.swapped_out ? expected_host : expected).at(block);
    check(seq.num_committed <= std::ssize(seq.blocks), "a sequence has committed more blocks than it has");
  }
  for (BlockId block = 0; block < pool_.num_blocks(); ++block) {
    check(pool_.ref_count(block) == expected[block],
          "a block's reference count is not the number of its table entries and readers");
  }
  for (BlockId block = 0; block < host_pool_.num_blocks(); ++block) {
    check(host_pool_.ref_count(block) == expected_host[block],
          "a host block's reference count is not the number of its table entries");
  }
}

void BlockManager::check_free_list() const {
  const auto count_unused = [](const BlockPool& pool) {
    int32_t unused = 0;
    for (BlockId block = 0; block < pool.num_blocks(); ++block) unused += pool.ref_count(block) == 0;
    return unused;
  };
  check(std::ssize(pool_.free_list()) == count_unused(pool_), "a block is neither in use nor on the free list");
  check(std::ssize(host_pool_.free_list()) == count_unused(host_pool_),
        "a host block is neither in use nor on the free list");
  const std::vector<BlockId> free_blocks = pool_.free_list();
  check(std::ranges::is_partitioned(free_blocks, [this](BlockId block) { return !cache_.contains(block); }),
        "a cached block is on the free list before one that is not");
}

void BlockManager::check_copies() const {
  std::vector<int32_t> expected_readers(pool_.num_blocks(), 0);
  for (size_t i = 0; i < copies_.size(); ++i) {
    const auto& [src, dst] = copies_[i];
    ++expected_readers.at(src);
    check(copy_into_[dst] == static_cast<int32_t>(i), "two pending copies write the same block");
    check(copy_into_[src] < 0, "a pending copy reads a block that another one writes");
    check(num_owners(dst) > 0, "a pending copy writes a block that is in no block table");
  }
  check(expected_readers == num_readers_, "the number of a block's readers is not that of the pending copies from it");
  const auto num_written = std::ranges::count_if(copy_into_, [](int32_t index) { return index >= 0; });
  check(num_written == std::ssize(copies_), "a block waits for a copy that is not pending");
}

}  // namespace pagedcore
