// Putting the decode attention's results together: those of a block's warps, and those of the blocks that share an
// item.
#pragma once

#include "attention.cuh"

namespace pagedcore::cuda {

template <typename T>
__device__ __forceinline__ void store_output(T* out, float4 value, float scale) {
  uint2 packed;
  packed.x = pack<T>(value.x * scale, value.y * scale);
  packed.y = pack<T>(value.z * scale, value.w * scale);
  *reinterpret_cast<uint2*>(out) = packed;
}

__device__ __forceinline__ void add_scaled(float4& sum, float4 value, float scale) {
  sum.x += value.x * scale;
  sum.y += value.y * scale;
  sum.z += value.z * scale;
  sum.w += value.w * scale;
}

// Merge the warps' states: into `out` [head, dim] when the block had the whole item, else into `partial`.
template <typename Config, typename T>
__device__ __forceinline__ void merge_warps(const float* outputs, const float* maxima, const float* sums, int num_heads,
                                            float scale_log2, T* out, float* partial) {
  constexpr int kQuads = Config::kSteps * 4;
  for (int index = threadIdx.x; index < num_heads * kQuads; index += Config::kThreads) {
    const int head = index / kQuads, quad = index % kQuads;
    float largest = kNoScore, total = 0.f;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) largest = fmaxf(largest, maxima[w * Config::kHeads + head]);
    float4 merged{0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) {
      const float scale = exp2_fast((maxima[w * Config::kHeads + head] - largest) * scale_log2);
      total += sums[w * Config::kHeads + head] * scale;
      add_scaled(
          merged,
          *reinterpret_cast<const float4*>(outputs + (w * Config::kHeads + head) * Config::kMergePitch + quad * 4),
          scale);
    }
    if (partial == nullptr) {
      store_output(out + index * 4, merged, 1.f / total);
    } else {
      if (quad == 0) {
        partial[head] = largest;
        partial[Config::kHeads + head] = total;
      }
      *reinterpret_cast<float4*>(partial + 2 * Config::kHeads + index * 4) = merged;
    }
  }
}

// Put an item's partial results together, in the order of its tokens: block `first`'s second one, then the first of
// each block up to `last`.
template <typename Config, typename T>
__device__ __forceinline__ void merge_partials(const float* partials, int first, int last, int num_heads,
                                               float scale_log2, T* out) {
  constexpr int kQuads = Config::kSteps * 4;
  const auto partial = [&](int block) {
    return partials + (2 * int64_t{block} + (block == first ? 1 : 0)) * Config::kPartialFloats;
  };
  constexpr int kAtOnce = 8;  // partial results whose loads are in flight together
  for (int index = threadIdx.x; index < num_heads * kQuads; index += Config::kThreads) {
    const int head = index / kQuads;
    float largest = kNoScore, total = 0.f;
    float4 merged{0.f, 0.f, 0.f, 0.f};
    for (int block = first; block <= last; block += kAtOnce) {
      float maxima[kAtOnce], sums[kAtOnce];
      float4 outputs[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float* source = partial(min(block + i, last));
        maxima[i] = block + i <= last ? __ldcg(source + head) : kNoScore;
        sums[i] = __ldcg(source + Config::kHeads + head);
        outputs[i] = __ldcg(reinterpret_cast<const float4*>(source + 2 * Config::kHeads + index * 4));
      }
      float new_largest = largest;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) new_largest = fmaxf(new_largest, maxima[i]);
      const float correction = exp2_fast((largest - new_largest) * scale_log2);
      largest = new_largest;
      total *= correction;
      merged = {merged.x * correction, merged.y * correction, merged.z * correction, merged.w * correction};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float scale = exp2_fast((maxima[i] - largest) * scale_log2);
        total += sums[i] * scale;
        add_scaled(merged, outputs[i], scale);
      }
    }
    store_output(out + index * 4, merged, 1.f / total);
  }
}

}  // namespace pagedcore::cuda
