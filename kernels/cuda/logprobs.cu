// Log probabilities of the drawn and of the most likely tokens; the definitions are cpu/logprobs_row.h's.
#include "row_group.cuh"

namespace pagedcore::cuda {
namespace {

constexpr double kSumUnit =
    1099511627776.0;  // 2^40: weights are summed as multiples of 2^-40, exactly and so in any order

__global__ void __launch_bounds__(kRowThreads) logprobs_kernel(const __grid_constant__ Logprobs a) {
  __shared__ RowGroup::Shared shared;
  wait_for_previous_kernel();
  allow_next_kernel();
  RowGroup group(shared);
  const RowLogits row(a.logits, a.row_stride, a.vocab_size);
  const int index = RowGroup::row(), chosen = a.token_ids[index];
  const bool writes = RowGroup::block_rank() == 0 && threadIdx.x == 0;
  float* top = a.top + int64_t{index} * a.num_top;
  int32_t* top_ids = a.top_ids + int64_t{index} * a.num_top;
  uint64_t largest = row_maximum(group, row);
  if (largest == 0 || chosen < 0 || chosen >= a.vocab_size) {
    if (writes) {
      a.chosen[index] = NAN;
      a.rank[index] = 0;
      for (int i = 0; i < a.num_top; ++i) top[i] = NAN, top_ids[i] = -1;
    }
  } else {
    const float maximum = ranked_value(largest);
    const uint64_t own = ranked(row.logits[chosen], chosen);
    uint64_t totals[2] = {0, 0};  // of weights; of entries that come before the chosen one
    row.for_each_four([&](int first, const float (&values)[4]) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        totals[0] += static_cast<uint64_t>(__double2ll_rn(weight_of(subtract(maximum, values[j])) * kSumUnit));
        totals[1] += ranked(values[j], first + j) > own ? 1 : 0;
      }
    });
    group.sum(totals);
    const float log_sum = static_cast<float>(log(static_cast<double>(totals[0]) / kSumUnit));
    if (writes) {
      a.chosen[index] = -subtract(maximum, row.logits[chosen]) - log_sum;
      a.rank[index] = static_cast<int32_t>(totals[1]) + 1;
    }
    const uint64_t least = ranked(-INFINITY, 0);  // at and below it: logits of -inf
    for (int i = 0; i < a.num_top; ++i) {
      const bool exists = largest > least;
      if (writes) {
        top[i] = exists ? -subtract(maximum, ranked_value(largest)) - log_sum : -INFINITY;
        top_ids[i] = exists ? ranked_index(largest) : -1;
      }
      uint64_t next[1] = {0};
      if (i + 1 == a.num_top || !exists) continue;
      row.for_each_four([&](int first, const float (&values)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint64_t key = ranked(values[j], first + j);
          if (key < largest && key > next[0]) next[0] = key;
        }
      });
      group.maximum(next);
      largest = next[0];
    }
  }
  RowGroup::synchronize();  // no block leaves while another may still read its shared memory
}

}  // namespace

void logprobs(const Logprobs& a, Stream stream) { launch_rows(logprobs_kernel, a, stream); }

}  // namespace pagedcore::cuda
