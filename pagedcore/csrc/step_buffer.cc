#include "step_buffer.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace pagedcore {
namespace {

constexpr int64_t kHeaderSize = 16;
constexpr int64_t kNumSamplingColumns = 8;

// pagedcore/engine/step_plan.py: Header
enum HeaderField {
  kNumTokens,
  kNumRows,
  kTableWidth,
  kNumRealTokens,
  kNumRealRows,
  kMaxQueryLen,
  kMaxSeqLen,
  kNumCopies
};
constexpr int64_t kMaxLogprobs = 11;

[[noreturn]] void fail(size_t row, const std::string& text) {
  throw std::invalid_argument("row " + std::to_string(row) + " of the step " + text);
}

// The sections of the buffer.
struct Sections {
  int32_t *token_ids, *positions, *slot_mapping, *query_start_loc, *seq_lens, *block_tables, *copies;

  Sections(int32_t* buffer, const StepSizes& sizes)
      : token_ids(buffer + kHeaderSize),
        positions(token_ids + sizes.num_tokens),
        slot_mapping(positions + sizes.num_tokens),
        query_start_loc(slot_mapping + sizes.num_tokens),
        seq_lens(query_start_loc + sizes.num_rows + 1),
        block_tables(seq_lens + sizes.num_rows),
        copies(block_tables + sizes.num_rows * (sizes.table_width + kNumSamplingColumns)) {}
};

int64_t elements_needed(const StepSizes& sizes, int64_t num_copies) {
  return kHeaderSize + 3 * sizes.num_tokens + 1 + sizes.num_rows * (2 + sizes.table_width + kNumSamplingColumns) +
         2 * num_copies;
}

void check_sizes(std::span<const StepRow> rows, const StepSizes& sizes, int64_t num_copies, size_t buffer_size) {
  int64_t num_tokens = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].query_len < 0 || rows[i].num_computed < 0) fail(i, "computes or has computed fewer tokens than none");
    if (rows[i].query_len == 0 && i == 0) fail(i, "computes no tokens, and no row before it does");
    num_tokens += rows[i].query_len;
  }
  if (std::ssize(rows) > sizes.num_rows || num_tokens > sizes.num_tokens || sizes.table_width < 0) {
    throw std::invalid_argument("a step of " + std::to_string(rows.size()) + " rows and " + std::to_string(num_tokens) +
                                " tokens does not fit num_rows " + std::to_string(sizes.num_rows) + ", num_tokens " +
                                std::to_string(sizes.num_tokens) + ", table_width " +
                                std::to_string(sizes.table_width));
  }
  const int64_t needed = elements_needed(sizes, num_copies);
  if (needed > static_cast<int64_t>(buffer_size)) {
    throw std::invalid_argument("the step needs a buffer of " + std::to_string(needed) + " int32, got " +
                                std::to_string(buffer_size));
  }
}

void write_token_ids(size_t index, const StepRow& row, int32_t* out) {
  const int64_t num_known = std::clamp<int64_t>(std::ssize(row.token_ids) - row.num_computed, 0, row.query_len);
  std::copy_n(row.token_ids.data() + row.num_computed, num_known, out);
  if (num_known == row.query_len) return;
  if (row.num_computed + row.query_len > std::ssize(row.token_ids) + 1)
    fail(index, "has more than one token that is not known yet");
  if (row.last_row < 0) fail(index, "has a token that is not known, and no row of the previous step that draws it");
  out[num_known] = static_cast<int32_t>(-1 - row.last_row);
}

void write_slots(size_t index, const StepRow& row, const BlockManager& manager, std::span<const BlockId> table,
                 int32_t* positions, int32_t* slots) {
  const int32_t block_size = manager.block_size();
  const int64_t end = row.num_computed + row.query_len;
  for (int64_t position = row.num_computed; position < end;) {
    const BlockId block = table[position / block_size];
    if (!manager.writable(block)) fail(index, "writes to a block that is shared or cached: grow it first");
    const int64_t block_end = std::min(end, (position / block_size + 1) * block_size);
    for (; position < block_end; ++position) {
      *positions++ = static_cast<int32_t>(position);
      *slots++ = block * block_size + static_cast<int32_t>(position % block_size);
    }
  }
}

}  // namespace

int64_t fill_step(BlockManager& manager, std::span<const StepRow> rows, const StepSizes& sizes,
                  std::span<int32_t> buffer) {
  const std::span<const BlockCopy> copies = manager.pending_copies();
  check_sizes(rows, sizes, std::ssize(copies), buffer.size());
  const Sections out(buffer.data(), sizes);
  int64_t num_tokens = 0, max_query_len = 0, max_seq_len = 0;

  for (size_t i = 0; i < rows.size(); ++i) {
    const StepRow& row = rows[i];
    int32_t* table_row = out.block_tables + static_cast<int64_t>(i) * sizes.table_width;
    out.query_start_loc[i] = static_cast<int32_t>(num_tokens);
    if (row.query_len == 0) {
      out.seq_lens[i] = 0;
      std::fill_n(table_row, sizes.table_width, 0);
      continue;
    }
    const int64_t seq_len = row.num_computed + row.query_len;
    const std::span<const BlockId> table = manager.block_table(row.seq_id);
    const int64_t num_used = manager.blocks_needed(seq_len);
    if (num_used > std::ssize(table)) fail(i, "reaches behind the sequence's blocks: grow it first");
    if (num_used > sizes.table_width) fail(i, "has more blocks than table_width");
    write_token_ids(i, row, out.token_ids + num_tokens);
    write_slots(i, row, manager, table, out.positions + num_tokens, out.slot_mapping + num_tokens);
    out.seq_lens[i] = static_cast<int32_t>(seq_len);
    std::fill_n(std::copy_n(table.data(), num_used, table_row), sizes.table_width - num_used, 0);
    num_tokens += row.query_len;
    max_query_len = std::max(max_query_len, row.query_len);
    max_seq_len = std::max(max_seq_len, seq_len);
  }

  const int64_t num_rows = std::ssize(rows);
  std::fill(out.token_ids + num_tokens, out.positions, 0);
  std::fill(out.positions + num_tokens, out.slot_mapping, 0);
  std::fill(out.slot_mapping + num_tokens, out.query_start_loc, -1);
  std::fill(out.query_start_loc + num_rows, out.seq_lens, static_cast<int32_t>(num_tokens));
  std::fill(out.seq_lens + num_rows, out.block_tables, 0);
  std::fill_n(out.block_tables + num_rows * sizes.table_width, (sizes.num_rows - num_rows) * sizes.table_width, 0);
  int32_t* end = out.copies;
  for (const auto& [src, dst] : copies) {
    *end++ = src;
    *end++ = dst;
  }

  int32_t* header = buffer.data();
  std::fill_n(header, kHeaderSize, 0);
  header[kNumTokens] = static_cast<int32_t>(sizes.num_tokens);
  header[kNumRows] = static_cast<int32_t>(sizes.num_rows);
  header[kTableWidth] = static_cast<int32_t>(sizes.table_width);
  header[kNumRealTokens] = static_cast<int32_t>(num_tokens);
  header[kNumRealRows] = static_cast<int32_t>(num_rows);
  header[kMaxQueryLen] = static_cast<int32_t>(max_query_len);
  header[kMaxSeqLen] = static_cast<int32_t>(max_seq_len);
  header[kNumCopies] = static_cast<int32_t>(std::ssize(copies));
  header[kMaxLogprobs] = -1;  // until the caller says otherwise, no row wants any
  manager.clear_pending_copies();
  return end - buffer.data();
}

int64_t copy_tokens(std::span<const int32_t> tokens, int64_t start, int64_t length, int32_t unknown,
                    std::span<int32_t> out) {
  if (start < 0 || length < 0 || length > std::ssize(out)) {
    throw std::invalid_argument(std::to_string(length) + " tokens from " + std::to_string(start) +
                                " on do not fit a buffer of " + std::to_string(out.size()) + " int32");
  }
  const int64_t num_known = std::clamp<int64_t>(std::ssize(tokens) - start, 0, length);
  std::copy_n(tokens.data() + start, num_known, out.data());
  std::fill_n(out.data() + num_known, length - num_known, unknown);
  return length;
}

}  // namespace pagedcore
