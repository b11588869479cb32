// Fills the packed int32 buffer of one step (the layout is pagedcore/engine/step_plan.py: StepLayout).
#pragma once

#include <cstdint>
#include <span>

#include "block_manager.h"

namespace pagedcore {

// One sequence in a step: compute its tokens [num_computed, num_computed + query_len). Without any, the row draws from
// the last token of the row before it, and nothing but its place in the step is looked at.
struct StepRow {
  SequenceId seq_id;
  int64_t num_computed;
  int64_t query_len;
  std::span<const int32_t> token_ids;  // those the host knows
  int64_t last_row;                    // row of the previous step that draws the token behind them; -1: none does
};

// Sizes of the sections, padding included.
struct StepSizes {
  int64_t num_rows;
  int64_t num_tokens;
  int64_t table_width;
};

// Write header, token ids, positions, slot mapping, query starts, lengths, block tables and pending copies; the copies
// are then no longer pending. The sampling section is skipped. Returns the offset behind the copies. Throws
// std::invalid_argument, with the copies still pending, if something does not fit or a slot is not the sequence's alone
// to write.
int64_t fill_step(BlockManager& manager, std::span<const StepRow> rows, const StepSizes& sizes,
                  std::span<int32_t> buffer);

// Copy tokens [start, start + length) to the beginning of `out`, with `unknown` for those behind the end of `tokens`.
// Returns `length`. Throws std::invalid_argument if they do not fit.
int64_t copy_tokens(std::span<const int32_t> tokens, int64_t start, int64_t length, int32_t unknown,
                    std::span<int32_t> out);

}  // namespace pagedcore
