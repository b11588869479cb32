// The instruction-set variants of the sampling kernels: one source (sample_row.h, logprobs_row.h), compiled once for
// each.
#pragma once

#include <cstdint>

#include "ops.h"

namespace pagedcore::cpu {

constexpr int64_t kGroup = 64;  // vocabulary entries whose random numbers are made together
constexpr int64_t kScratchArrays = 4;
constexpr int64_t padded_vocab(int64_t vocab_size) { return (vocab_size + kGroup - 1) / kGroup * kGroup; }

// Rows [begin, end); `scratch`: kScratchArrays * padded_vocab floats.
using SampleRows = void(const Sample&, int64_t begin, int64_t end, float* scratch);
using LogprobsRows = void(const Logprobs&, int64_t begin, int64_t end, float* scratch);

#ifdef __x86_64__
SampleRows sample_rows_avx2, sample_rows_avx512;
LogprobsRows logprobs_rows_avx2, logprobs_rows_avx512;
#endif

}  // namespace pagedcore::cpu
