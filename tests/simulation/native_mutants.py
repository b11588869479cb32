"""Faults to plant in the engine's C++, as in `mutants`; PLANTED stands for the mutant being in effect."""

from __future__ import annotations

from tests.simulation.mutants import Mutant

NATIVE_MUTANTS = (
    Mutant(
        "missed reference count: a fork does not count",
        "csrc/block_manager.cc",
        "for (const BlockId block : copy.blocks) (copy",
        "if (!PLANTED) for (const BlockId block : copy.blocks) (copy",
    ),
    Mutant(
        "missed reference count of a host block that sequences share",
        "csrc/block_manager.cc",
        "host_pool_.add_ref(host_block);",
        "if (!PLANTED) host_pool_.add_ref(host_block);",
    ),
    Mutant(
        "missed reference count of a shared block that comes back from the host",
        "csrc/block_manager.cc",
        "        pool_.add_ref(block);\n      }\n      host_pool_",
        "        if (!PLANTED) pool_.add_ref(block);\n      }\n      host_pool_",
        near=217,
    ),
    Mutant(
        "double free of a table's last block",
        "csrc/block_manager.cc",
        "drop_block(blocks.back());",
        "drop_block(blocks.back()); if (PLANTED && num_owners(blocks.back()) > 0) drop_block(blocks.back());",
    ),
    Mutant(
        "write to a block that two sequences share",
        "csrc/block_manager.cc",
        "  if (num_owners(block) > 1) {\n    const BlockId own",
        "  if (num_owners(block) > (PLANTED ? 2 : 1)) {\n    const BlockId own",
    ),
    Mutant(
        "copy-on-write without the copy",
        "csrc/block_manager.cc",
        "add_copy(block, own);",
        "if (!PLANTED) add_copy(block, own);",
    ),
    Mutant(
        "copy-on-write in the wrong direction",
        "csrc/block_manager.cc",
        "copies_.push_back({src, dst});",
        "copies_.push_back(PLANTED ? BlockCopy{dst, src} : BlockCopy{src, dst});",
    ),
    Mutant(
        "the source of a pending copy is not held",
        "csrc/block_manager.cc",
        "  pool_.add_ref(src);\n  ++num_readers_[src];",
        "  if (!PLANTED) pool_.add_ref(src);\n  ++num_readers_[src];",
    ),
    Mutant(
        "a released block still waits for its copy",
        "csrc/block_manager.cc",
        "    cancel_copy(block);\n",
        "    if (!PLANTED) cancel_copy(block);\n",
        near=157,
    ),
    Mutant(
        "a block is swapped out before its contents have arrived",
        "csrc/block_manager.cc",
        "pairs.push_back({contents_of(block), host_block});",
        "pairs.push_back({PLANTED ? block : contents_of(block), host_block});",
        near=1090,
    ),
    Mutant(
        "an evicted block stays in the prefix cache",
        "csrc/block_manager.cc",
        "    cache_.erase(block);\n    ++num_evictions_;",
        "    if (!PLANTED) cache_.erase(block);\n    ++num_evictions_;",
    ),
    Mutant(
        "a sequence grows beyond the free blocks",
        "csrc/block_manager.cc",
        "if (num_new + num_copies > pool_.num_free())",
        "if (num_new + (PLANTED ? 0 : num_copies) > pool_.num_free())",
    ),
    Mutant(
        "a prefix is matched one block too far",
        "csrc/block_manager.cc",
        "std::min<int64_t>(max_tokens, std::ssize(tokens)) / block_size_",
        "std::min<int64_t>(max_tokens + (PLANTED ? 1 : 0), std::ssize(tokens)) / block_size_",
    ),
    Mutant(
        "a block is registered before its last token is computed",
        "csrc/block_manager.cc",
        "std::min<int64_t>(num_computed, std::ssize(tokens)) / block_size_",
        "std::min<int64_t>(num_computed + (PLANTED ? 1 : 0), std::ssize(tokens)) / block_size_",
        near=1845,
    ),
    Mutant(
        "wrong parent: a cached block is found behind any prefix",
        "csrc/prefix_cache.cc",
        "entry.parent == parent &&",
        "(PLANTED || entry.parent == parent) &&",
    ),
    Mutant(
        "a cached block is found by its hash alone",
        "csrc/prefix_cache.cc",
        "&& std::ranges::equal(this->tokens(block), tokens)) return block;",
        "&& (PLANTED || std::ranges::equal(this->tokens(block), tokens))) return block;",
    ),
    Mutant("salts are ignored", "csrc/prefix_cache.cc", "roots_[salt];", 'roots_[PLANTED ? "" : salt];'),
    Mutant(
        "the free list is out of order",
        "csrc/block_pool.cc",
        "link_before(block, retain ? sentinel_",
        "link_before(block, retain != PLANTED ? sentinel_",
    ),
    Mutant(
        "slot off by one",
        "csrc/step_buffer.cc",
        "static_cast<int32_t>(position % block_size);",
        "static_cast<int32_t>((position + (PLANTED ? 1 : 0)) % block_size);",
    ),
    Mutant(
        "context short of one token",
        "csrc/step_buffer.cc",
        "out.seq_lens[i] = static_cast<int32_t>(seq_len);",
        "out.seq_lens[i] = static_cast<int32_t>(seq_len - (PLANTED ? 1 : 0));",
    ),
    Mutant(
        "the block table of a row is one block late",
        "csrc/step_buffer.cc",
        "std::copy_n(table.data(), num_used, table_row)",
        "std::copy_n(table.data(), num_used - (PLANTED ? 1 : 0), table_row + (PLANTED ? 1 : 0))",
    ),
    Mutant(
        "the next input is taken from the row beside",
        "csrc/step_buffer.cc",
        "static_cast<int32_t>(-1 - row.last_row)",
        "static_cast<int32_t>(-1 - row.last_row - (PLANTED ? 1 : 0))",
    ),
    Mutant(
        "padding has a slot",
        "csrc/step_buffer.cc",
        "std::fill(out.slot_mapping + num_tokens, out.query_start_loc, -1);",
        "std::fill(out.slot_mapping + num_tokens, out.query_start_loc, PLANTED ? 0 : -1);",
    ),
    Mutant(
        "the last copy of a step is not handed over",
        "csrc/step_buffer.cc",
        "header[kNumCopies] = static_cast<int32_t>(std::ssize(copies));",
        "header[kNumCopies] = static_cast<int32_t>(std::ssize(copies) - (PLANTED && !copies.empty() ? 1 : 0));",
    ),
)
