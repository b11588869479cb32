// Drawing one token from a row of logits, written as plain loops that compilers vectorize for any instruction set.
//
// With m the row's maximum and T the temperature, an entry's distance is d = (m - logit) * (1 / T), its weight exp(-d),
// both fp32.
//   top-k   keeps d <= t, t the k-th smallest distance (the same number more than once counts as often).
//   top-p   keeps d <= t, t the smallest distance of what top-k left such that the weights of the entries up to it sum
//   to at least top_p
//           times the whole. Weights are rounded to multiples of 2^-30 and summed as integers: the sums are exact, so
//           the order of summation, and with it threads and processors, cannot matter.
//   min-p   keeps weight >= min_p.
// Entries that share the threshold's distance are all kept. The token is the lowest id of largest Gumbel(v) - d among
// the kept. A row with a NaN, a +inf or nothing but -inf has no distribution: its token is -1.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "cpu/sample_math.h"
#include "cpu/sample_variants.h"

namespace pagedcore::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMaxDistance = 87.0f;  // beyond it a weight is 0 in every use
constexpr float kWeightOne = 1073741824.0f;

// Integers in the order of the floats they stand for, so that minima and maxima vectorize without -ffast-math.
inline int32_t ordered(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
inline float from_ordered(int32_t key) { return std::bit_cast<float>(key ^ ((key >> 31) & 0x7FFFFFFF)); }

// The maximum of a row; NaN when the row has no distribution.
inline float row_maximum(const float* logits, int32_t n) {
  int32_t largest = std::numeric_limits<int32_t>::min();
  int32_t smallest = std::numeric_limits<int32_t>::max();
  for (int32_t i = 0; i < n; ++i) {
    const int32_t key = ordered(logits[i]);
    largest = key > largest ? key : largest;
    smallest = key < smallest ? key : smallest;
  }
  // In this order: negative NaNs, -inf, numbers, +inf, positive NaNs.
  const int32_t minus_infinity = ordered(-kInfinity);
  if (smallest < minus_infinity || largest == minus_infinity || largest >= ordered(kInfinity)) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  return from_ordered(largest);
}

// The lowest index of a value that occurs.
inline int32_t first_index(const float* values, int32_t n, float wanted) {
  constexpr int32_t kBlock = 256;
  int32_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    int32_t found = 0;
    for (int32_t j = 0; j < kBlock; ++j) found |= values[i + j] == wanted;
    if (found) break;
  }
  while (values[i] != wanted) ++i;
  return i;
}

// Distances are not negative, so their bits are in their order.
inline int32_t key_of(float distance) { return std::bit_cast<int32_t>(distance); }

// exp(-distance), also for a distance of infinity. An integer minimum, because compilers turn one of floats into
// branches.
inline float weight_of(float distance) {
  const int32_t key = key_of(distance);
  const int32_t limit = key_of(kMaxDistance);
  return exp_nonpositive(-std::bit_cast<float>(key < limit ? key : limit));
}

// Entries that can hold the threshold: those with keys in [low, high].
struct Candidates {
  const float* distances;
  const int32_t* weights;  // null: each weighs 1
  int32_t n;
};

// What lies up to a pivot, and the keys next to it on both sides.
struct Split {
  int64_t weight;
  int32_t count;
  int32_t last_near;
  int32_t first_far;
};

template <bool kWeighted>
Split split_at(const float* distances, const int32_t* weights, int32_t n, int32_t pivot) {
  int64_t weight = 0;
  int32_t count = 0;
  int32_t last_near = -1;
  int32_t first_far = std::numeric_limits<int32_t>::max();
  for (int32_t i = 0; i < n; ++i) {
    const int32_t key = key_of(distances[i]);
    const int32_t near = -static_cast<int32_t>(key <= pivot);  // masks: compilers vectorize these, not conditions
    const int32_t near_key = key | ~near;
    const int32_t far_key = key | (near & 0x7FFFFFFF);
    count -= near;
    if constexpr (kWeighted) weight += weights[i] & near;
    last_near = near_key > last_near ? near_key : last_near;
    first_far = far_key < first_far ? far_key : first_far;
  }
  return {kWeighted ? weight : count, count, last_near, first_far};
}

// Copy the entries with keys in [low, high]; in place is fine. Returns how many.
template <bool kWeighted>
int32_t compact(const Candidates& all, int32_t low, int32_t high, float* distances, int32_t* weights) {
  int32_t kept = 0;
  for (int32_t i = 0; i < all.n; ++i) {
    const float distance = all.distances[i];
    distances[kept] = distance;
    if constexpr (kWeighted) weights[kept] = all.weights[i];
    kept += (key_of(distance) >= low) & (key_of(distance) <= high);
  }
  return kept;
}

// The smallest t such that the entries of distance <= t weigh at least `needed`, which is positive and at most the
// weight of the entries up to `limit`. Bisects the values that occur; `copy` and `weights` (which may be all.weights)
// take the shrinking rest.
template <bool kWeighted>
float select_threshold(Candidates all, int64_t needed, float limit, float* copy, int32_t* weights) {
  int32_t low = 0;  // t is in [low, high]
  int32_t high = key_of(limit);
  int32_t count_to_high = all.n;
  int32_t count_below = 0;
  int64_t weight_below = 0;
  while (low != high) {
    const float low_value = std::bit_cast<float>(low);
    const int32_t middle = key_of(low_value + 0.5f * (std::bit_cast<float>(high) - low_value));
    const int32_t pivot = middle < high ? middle : low;
    const Split split = split_at<kWeighted>(all.distances, all.weights, all.n, pivot);
    if (split.weight >= needed) {
      high = split.last_near;
      count_to_high = split.count;
    } else {
      low = split.first_far;
      count_below = split.count;
      weight_below = split.weight;
    }
    if (count_to_high - count_below < all.n / 4) {
      count_to_high = compact<kWeighted>(all, low, high, copy, weights);
      all = {copy, weights, count_to_high};
      needed -= weight_below;
      count_below = 0;
      weight_below = 0;
    }
  }
  return std::bit_cast<float>(high);
}

inline void keep_up_to(float* distances, int32_t n, float threshold) {
  for (int32_t i = 0; i < n; ++i) distances[i] = distances[i] <= threshold ? distances[i] : kInfinity;
}

inline int32_t count_finite(const float* distances, int32_t n) {
  int32_t finite = 0;
  for (int32_t i = 0; i < n; ++i) finite += distances[i] < kInfinity;
  return finite;
}

inline void apply_top_k(float* distances, int32_t n, int32_t top_k, float* copy) {
  if (top_k >= count_finite(distances, n)) return;
  constexpr float kLimit = std::numeric_limits<float>::max();
  keep_up_to(distances, n, select_threshold<false>({distances, nullptr, n}, top_k, kLimit, copy, nullptr));
}

inline void apply_top_p(float* distances, int32_t n, float top_p, float* copy, int32_t* weights) {
  int64_t total = 0;
  for (int32_t i = 0; i < n; ++i) {
    weights[i] = static_cast<int32_t>(weight_of(distances[i]) * kWeightOne + 0.5f);
    total += weights[i];
  }
  // The sum is exact in a double (below 2^53) and the product rounds once; the most likely token always stays.
  const double share = static_cast<double>(top_p) * static_cast<double>(total);
  auto needed = static_cast<int64_t>(share);
  needed += static_cast<double>(needed) < share;
  keep_up_to(distances, n,
             select_threshold<true>({distances, weights, n}, needed > 0 ? needed : 1, kMaxDistance, copy, weights));
}

inline void apply_min_p(float* distances, int32_t n, float min_p) {
  for (int32_t i = 0; i < n; ++i) distances[i] = weight_of(distances[i]) >= min_p ? distances[i] : kInfinity;
}

// Scores of the group's entries [first, first + kGroup).
inline void group_scores(float* scores, const float* distances, int32_t first, const int32_t* parameters) {
  constexpr int32_t kCounters = kGroup / 4;
  const auto key0 = static_cast<uint32_t>(parameters[kSeedLow]);
  const auto key1 = static_cast<uint32_t>(parameters[kSeedHigh]);
  const auto draw = static_cast<uint32_t>(parameters[kDrawIndex]);
  uint32_t words[4][kCounters];
  for (int32_t i = 0; i < kCounters; ++i) {
    const PhiloxCounter random = philox({static_cast<uint32_t>(first / 4 + i), draw, 0, 0}, key0, key1);
    words[0][i] = random.x0;
    words[1][i] = random.x1;
    words[2][i] = random.x2;
    words[3][i] = random.x3;
  }
  for (int32_t i = 0; i < kCounters; ++i) {
    for (int32_t j = 0; j < 4; ++j) scores[4 * i + j] = gumbel(words[j][i]);
  }
  for (int32_t i = 0; i < kGroup; ++i) scores[i] -= distances[first + i];
}

// Gumbel-max over the entries of finite distance; n is padded with infinite ones.
inline int32_t draw(const float* distances, int32_t n, const int32_t* parameters) {
  float best = -kInfinity;
  int32_t best_id = -1;
  for (int32_t first = 0; first < n; first += kGroup) {
    int32_t nearest = std::numeric_limits<int32_t>::max();
    for (int32_t i = 0; i < kGroup; ++i) {
      const int32_t key = key_of(distances[first + i]);
      nearest = key < nearest ? key : nearest;
    }
    if (!(kMaxGumbel - std::bit_cast<float>(nearest) > best)) continue;  // no entry of the group can win
    float scores[kGroup];
    group_scores(scores, distances, first, parameters);
    int32_t largest = std::numeric_limits<int32_t>::min();
    for (int32_t i = 0; i < kGroup; ++i) {
      const int32_t key = ordered(scores[i]);
      largest = key > largest ? key : largest;
    }
    if (from_ordered(largest) > best) {
      best = from_ordered(largest);
      best_id = first + first_index(scores, kGroup, best);
    }
  }
  return best_id;
}

inline int32_t sample_row(const float* logits, int32_t n, const int32_t* parameters, float* scratch) {
  const float maximum = row_maximum(logits, n);
  if (maximum != maximum) return -1;
  const float temperature = std::bit_cast<float>(parameters[kTemperature]);
  if (!(temperature > 0.0f)) return first_index(logits, n, maximum);

  const int64_t padded = padded_vocab(n);
  float* distances = scratch;
  float* copy = scratch + padded;
  auto* weights = reinterpret_cast<int32_t*>(scratch + 2 * padded);
  const float inverse_temperature = 1.0f / temperature;
  for (int32_t i = 0; i < n; ++i) distances[i] = (maximum - logits[i]) * inverse_temperature;
  for (int64_t i = n; i < padded; ++i) distances[i] = kInfinity;

  const int32_t top_k = parameters[kTopK];
  const float top_p = std::bit_cast<float>(parameters[kTopP]);
  const float min_p = std::bit_cast<float>(parameters[kMinP]);
  if (top_k > 0 && top_k < n) apply_top_k(distances, n, top_k, copy);
  if (top_p < 1.0f) apply_top_p(distances, n, top_p, copy, weights);
  if (min_p > 0.0f) apply_min_p(distances, n, min_p);
  return draw(distances, static_cast<int32_t>(padded), parameters);
}

inline void sample_rows(const Sample& op, int64_t begin, int64_t end, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    op.token_ids[row] =
        sample_row(op.logits + row * op.row_stride, op.vocab_size, op.parameters + row * kNumSamplingColumns, scratch);
  }
}

}  // namespace
}  // namespace pagedcore::cpu
