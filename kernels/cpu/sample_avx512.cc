#ifdef __x86_64__

#include "cpu/logprobs_row.h"
#include "cpu/sample_row.h"

namespace pagedcore::cpu {

void sample_rows_avx512(const Sample& op, int64_t begin, int64_t end, float* scratch) {
  sample_rows(op, begin, end, scratch);
}

void logprobs_rows_avx512(const Logprobs& op, int64_t begin, int64_t end, float* scratch) {
  logprobs_rows(op, begin, end, scratch);
}

}  // namespace pagedcore::cpu

#endif
