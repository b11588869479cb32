#include <memory>

#include "cpu/dispatch.h"
#include "cpu/logprobs_row.h"
#include "cpu/sample_row.h"
#include "cpu/thread_pool.h"

namespace pagedcore::cpu {
namespace {

SampleRows* sample_function() {
#ifdef __x86_64__
  if (isa() >= Isa::kAvx512) return sample_rows_avx512;
  if (isa() >= Isa::kAvx2) return sample_rows_avx2;
#endif
  return sample_rows;
}

LogprobsRows* logprobs_function() {
#ifdef __x86_64__
  if (isa() >= Isa::kAvx512) return logprobs_rows_avx512;
  if (isa() >= Isa::kAvx2) return logprobs_rows_avx2;
#endif
  return logprobs_rows;
}

// This thread's working memory, kept between calls: an allocation of this size would be paged in anew for every row.
float* scratch_for(int32_t vocab_size) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t capacity = 0;
  const int64_t wanted = kScratchArrays * padded_vocab(vocab_size);
  if (wanted > capacity) {
    memory = std::make_unique<float[]>(wanted);
    capacity = wanted;
  }
  return memory.get();
}

}  // namespace

void sample(const Sample& op) {
  SampleRows* const rows = sample_function();
  parallel_for(op.num_rows, 1, [&](int64_t begin, int64_t end) { rows(op, begin, end, scratch_for(op.vocab_size)); });
}

void logprobs(const Logprobs& op) {
  LogprobsRows* const rows = logprobs_function();
  parallel_for(op.num_rows, 1, [&](int64_t begin, int64_t end) { rows(op, begin, end, scratch_for(op.vocab_size)); });
}

}  // namespace pagedcore::cpu
