// Drawing a token from each row of logits without sorting them and without the host; the definitions are
// cpu/sample_row.h's, and so are the bits.
#include "row_group.cuh"

namespace pagedcore::cuda {
namespace {

constexpr int kPivots = 7;
constexpr int kMaxCandidates = 8192;
constexpr float kLargestFinite = 3.402823466e38f;
constexpr float kMaxDistance = 87.0f;
constexpr float kWeightOne = 1073741824.0f;
constexpr float kMaxGumbel = 22.19f, kMinGumbel = -4.f;  // what gumbel() stays between

struct Distances {
  float maximum;
  float inverse_temperature;
  float limit;  // entries further away are out

  __device__ __forceinline__ float of(float logit) const {
    return multiply(subtract(maximum, logit), inverse_temperature);
  }
};

__device__ __forceinline__ uint64_t rounded_weight(float distance) {
  return static_cast<uint64_t>(__float2int_rz(add(multiply(weight_of(distance), kWeightOne), 0.5f)));
}

// The entries of a range of distances, in this thread block's shared memory; their order does not matter.
struct Candidates {
  float distances[kMaxCandidates];
  int count;

  // By all threads of the row: keep the row's entries in [low, high]. False, for the whole row, if they are too many.
  __device__ bool gather(RowGroup& group, const RowLogits& row, const Distances& all, int low, int high) {
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    row.for_each_four([&](int, const float (&values)[4]) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float distance = all.of(values[j]);
        const int key = __float_as_int(distance);
        if (key < low || key > high || !(distance <= all.limit)) continue;
        const int slot = atomicAdd(&count, 1);
        if (slot < kMaxCandidates) distances[slot] = distance;
      }
    });
    __syncthreads();
    uint64_t most[1] = {static_cast<uint64_t>(count)};
    group.maximum(most);
    return most[0] <= kMaxCandidates;
  }
};

// The smallest distance such that the entries up to it weigh at least `needed(weight of all)`; `limit` if all up to
// there weigh less.
//
// Each pass sums the weights up to seven pivots; the range of distances narrows to that between two of them. The first
// pivots are spread over likely distances, the later ones over the range's bit patterns, which are in the distances'
// order. As soon as the range's entries fit into shared memory, the passes leave the row alone.
template <typename Weight, typename Needed>
__device__ float select_threshold(RowGroup& group, Candidates& candidates, const RowLogits& row,
                                  const Distances& distances, float limit, Weight weight, Needed needed_of) {
  int low = 0, high = __float_as_int(limit);
  int pivots[kPivots] = {__float_as_int(0.5f), __float_as_int(1.5f), __float_as_int(3.f), __float_as_int(5.f),
                         __float_as_int(8.f),  __float_as_int(12.f), __float_as_int(20.f)};
  uint64_t needed = 0;
  bool is_first = true, is_gathered = false;
  while (low != high) {
    if (!is_first && !is_gathered) is_gathered = candidates.gather(group, row, distances, low, high);
    uint64_t totals[kPivots + 1] = {};
    const auto add_entry = [&](float distance) {
      const int key = __float_as_int(distance);
      if (key < low || key > high || !(distance <= distances.limit)) return;
      const uint64_t own = weight(distance);
#pragma unroll
      for (int p = 0; p < kPivots; ++p) totals[p] += key <= pivots[p] ? own : 0;
      totals[kPivots] += own;
    };
    if (is_gathered) {
      for (int i = threadIdx.x; i < candidates.count; i += kRowThreads) add_entry(candidates.distances[i]);
    } else {
      row.for_each_four([&](int, const float (&values)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) add_entry(distances.of(values[j]));
      });
    }
    group.sum(totals);
    if (is_first) needed = needed_of(totals[kPivots]);
    is_first = false;
    int new_low = low, new_high = high;
    uint64_t below = 0;
#pragma unroll
    for (int p = 0; p < kPivots; ++p) {
      if (totals[p] < needed) {
        new_low = max(new_low, min(pivots[p] + 1, high));
        below = totals[p];
      } else {
        new_high = min(new_high, pivots[p]);
      }
    }
    needed -= below;
    low = new_low;
    high = max(new_high, new_low);
    const int step = (high - low) / (kPivots + 1) + 1;
#pragma unroll
    for (int p = 0; p < kPivots; ++p) pivots[p] = min(low + (p + 1) * step - 1, high);
  }
  return __int_as_float(high);
}

__device__ float top_k_limit(RowGroup& group, Candidates& candidates, const RowLogits& row, const Distances& distances,
                             int top_k) {
  return select_threshold(
      group, candidates, row, distances, kLargestFinite, [](float) -> uint64_t { return 1; },
      [top_k](uint64_t) -> uint64_t { return top_k; });
}

__device__ float top_p_limit(RowGroup& group, Candidates& candidates, const RowLogits& row, const Distances& distances,
                             float top_p) {
  const float limit = select_threshold(group, candidates, row, distances, kMaxDistance, rounded_weight,
                                       [top_p](uint64_t total) -> uint64_t {
                                         const double share = __dmul_rn(top_p, static_cast<double>(total));
                                         const uint64_t whole = static_cast<uint64_t>(share);
                                         const uint64_t needed = whole + (static_cast<double>(whole) < share ? 1 : 0);
                                         return needed > 0 ? needed : 1;
                                       });
  return fminf(limit, distances.limit);
}

__global__ void __launch_bounds__(kRowThreads) sample_kernel(const __grid_constant__ Sample a) {
  __shared__ RowGroup::Shared shared;
  __shared__ Candidates candidates;
  wait_for_previous_kernel();
  allow_next_kernel();
  RowGroup group(shared);
  const RowLogits row(a.logits, a.row_stride, a.vocab_size);
  const int32_t* parameters = a.parameters + RowGroup::row() * kNumSamplingColumns;
  const float temperature = __int_as_float(parameters[kTemperature]);
  const uint64_t largest = row_maximum(group, row);
  int token = largest == 0 ? -1 : ranked_index(largest);
  if (largest != 0 && temperature > 0.f) {
    Distances distances{ranked_value(largest), __fdiv_rn(1.0f, temperature), kLargestFinite};
    const int top_k = parameters[kTopK];
    const float top_p = __int_as_float(parameters[kTopP]), min_p = __int_as_float(parameters[kMinP]);
    if (top_k > 0 && top_k < a.vocab_size) distances.limit = top_k_limit(group, candidates, row, distances, top_k);
    if (top_p < 1.f) distances.limit = top_p_limit(group, candidates, row, distances, top_p);
    uint64_t best[1] = {0};
    float best_score = kMinGumbel;  // the most likely token's score is above it
    row.for_each_four([&](int first, const float (&values)[4]) {
      float distance[4];
      bool can_win = false;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        distance[j] = distances.of(values[j]);
        can_win |= distance[j] <= distances.limit && subtract(kMaxGumbel, distance[j]) > best_score;
      }
      if (!can_win) return;
      const uint4 bits =
          philox({static_cast<uint32_t>(first) / 4, static_cast<uint32_t>(parameters[kDrawIndex]), 0, 0},
                 static_cast<uint32_t>(parameters[kSeedLow]), static_cast<uint32_t>(parameters[kSeedHigh]));
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(distance[j] <= distances.limit) || (min_p > 0.f && weight_of(distance[j]) < min_p)) continue;
        const float score = subtract(gumbel(words[j]), distance[j]);
        const uint64_t key = ranked(score, first + j);
        if (key > best[0]) best[0] = key;
        best_score = fmaxf(best_score, score);
      }
    });
    group.maximum(best);
    token = ranked_index(best[0]);
  }
  if (RowGroup::block_rank() == 0 && threadIdx.x == 0) a.token_ids[RowGroup::row()] = token;
  RowGroup::synchronize();  // no block leaves while another may still read its shared memory
}

}  // namespace

void sample(const Sample& a, Stream stream) { launch_rows(sample_kernel, a, stream); }

}  // namespace pagedcore::cuda
