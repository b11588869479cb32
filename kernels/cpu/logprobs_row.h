// Log probabilities of a row of logits, written as plain loops that compilers vectorize for any instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/sample_row.h"

namespace pagedcore::cpu {
namespace {

// log(sum(exp(logits))) - maximum. Sums of 16 interleaved lanes of a block in fp32, of blocks in double: the same on
// every processor.
inline float log_sum_exp_above(const float* logits, int32_t n, float maximum) {
  constexpr int32_t kLanes = 16;
  constexpr int32_t kBlock = 1024;
  double sum = 0.0;
  for (int32_t first = 0; first < n; first += kBlock) {
    const int32_t last = std::min(first + kBlock, n);
    float lanes[kLanes] = {};
    int32_t i = first;
    for (; i + kLanes <= last; i += kLanes) {
      for (int32_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += weight_of(maximum - logits[i + lane]);
      }
    }
    for (; i < last; ++i) lanes[0] += weight_of(maximum - logits[i]);
    for (const float lane : lanes) sum += lane;
  }
  return static_cast<float>(std::log(sum));
}

// Entries that come before the chosen one in the order of descending logits, equal ones by id; plus 1.
inline int32_t rank_of(const float* logits, int32_t n, int32_t chosen) {
  const float value = logits[chosen];
  int32_t rank = 1;
  for (int32_t i = 0; i < chosen; ++i) rank += logits[i] >= value;
  for (int32_t i = chosen + 1; i < n; ++i) rank += logits[i] > value;
  return rank;
}

inline bool any_up_to(const float* group, float threshold) {
  int32_t found = 0;
  for (int32_t i = 0; i < kGroup; ++i) found |= group[i] <= threshold;
  return found != 0;
}

struct Entry {
  float distance;
  int32_t id;
};

// The `count` most likely entries, in order. Returns how many there are: those of finite logits.
inline int32_t most_likely(const float* logits, int32_t n, float maximum, int32_t count, float* scratch,
                           Entry* entries) {
  const int64_t padded = padded_vocab(n);
  float* distances = scratch;
  for (int32_t i = 0; i < n; ++i) distances[i] = maximum - logits[i];
  for (int64_t i = n; i < padded; ++i) distances[i] = kInfinity;
  const int32_t finite = count_finite(distances, n);
  float threshold = std::numeric_limits<float>::max();
  if (count < finite) {
    threshold = select_threshold<false>({distances, nullptr, n}, count, threshold, scratch + padded, nullptr);
  }
  int32_t closer = 0;
  for (int32_t i = 0; i < n; ++i) closer += distances[i] < threshold;
  // Ids ascend, so of the entries at the threshold the first ones are the ones that belong here.
  int32_t ties = std::min(count, finite) - closer;
  int32_t num_entries = 0;
  for (int32_t first = 0; first < padded && num_entries < count; first += kGroup) {
    if (!any_up_to(distances + first, threshold)) continue;
    for (int32_t i = first; i < first + kGroup && num_entries < count; ++i) {
      if (distances[i] < threshold || (distances[i] == threshold && ties-- > 0)) {
        entries[num_entries++] = {distances[i], i};
      }
    }
  }
  std::sort(entries, entries + num_entries, [](const Entry& a, const Entry& b) {
    return a.distance != b.distance ? a.distance < b.distance : a.id < b.id;
  });
  return num_entries;
}

inline void logprobs_row(const Logprobs& op, int64_t row, float* scratch) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const int32_t n = op.vocab_size;
  const float* logits = op.logits + row * op.row_stride;
  float* top = op.top + row * op.num_top;
  int32_t* top_ids = op.top_ids + row * op.num_top;
  const int32_t chosen = op.token_ids[row];
  const float maximum = row_maximum(logits, n);
  if (maximum != maximum || chosen < 0 || chosen >= n) {
    op.chosen[row] = kNaN;
    op.rank[row] = 0;
    std::fill_n(top, op.num_top, kNaN);
    std::fill_n(top_ids, op.num_top, -1);
    return;
  }
  const float log_sum = log_sum_exp_above(logits, n, maximum);
  op.chosen[row] = -(maximum - logits[chosen]) - log_sum;
  op.rank[row] = rank_of(logits, n, chosen);
  if (op.num_top == 0) return;
  auto* entries = reinterpret_cast<Entry*>(scratch + 2 * padded_vocab(n));
  const int32_t num_entries = most_likely(logits, n, maximum, std::min(op.num_top, n), scratch, entries);
  for (int32_t i = 0; i < op.num_top; ++i) {
    top[i] = i < num_entries ? -entries[i].distance - log_sum : -kInfinity;
    top_ids[i] = i < num_entries ? entries[i].id : -1;
  }
}

inline void logprobs_rows(const Logprobs& op, int64_t begin, int64_t end, float* scratch) {
  for (int64_t row = begin; row < end; ++row) logprobs_row(op, row, scratch);
}

}  // namespace
}  // namespace pagedcore::cpu
