// Rotary embedding and the KV cache write of one token, written once over a vector type (vector_*.h).
// Included by one file per instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/rotary.h"

namespace pagedcore::cpu {

// Loads a head as floats, RMS-normalized where there is a norm weight.
template <class V, class Element>
void load_head(const Element* head, int head_dim, const Element* norm, float norm_eps, float* values) {
  typename V::Reg squares = V::set1(0.0f);
  for (int i = 0; i < head_dim; i += V::kWidth) {
    const typename V::Reg x = V::load(head + i);
    squares = V::fma(x, x, squares);
    V::store(values + i, x);
  }
  if (norm == nullptr) return;
  const typename V::Reg factor = V::set1(1.0f / std::sqrt(V::sum(squares) / static_cast<float>(head_dim) + norm_eps));
  for (int i = 0; i < head_dim; i += V::kWidth) {
    V::store(values + i, V::mul(V::mul(V::load(values + i), factor), V::load(norm + i)));
  }
}

// Rotates the pairs (i, i + rotary_dim / 2) of a head and stores it; the dimensions from rotary_dim on stay as they
// are.
template <class V, class Element>
void rotate_head(const float* values, const float* cos_sin, int head_dim, int rotary_dim, Element* head) {
  const int half = rotary_dim / 2;
  for (int i = 0; i < half; i += V::kWidth) {
    const int count = std::min(V::kWidth, half - i);
    const typename V::Reg first = V::load_first(values + i, count);
    const typename V::Reg second = V::load_first(values + half + i, count);
    const typename V::Reg cosine = V::load_first(cos_sin + i, count);
    const typename V::Reg sine = V::load_first(cos_sin + half + i, count);
    const typename V::Reg minus_sine = V::mul(sine, V::set1(-1.0f));
    V::store_first(head + i, count, V::fma(second, minus_sine, V::mul(first, cosine)));
    V::store_first(head + half + i, count, V::fma(first, sine, V::mul(second, cosine)));
  }
  for (int i = rotary_dim; i < head_dim; i += V::kWidth) {
    const int count = std::min(V::kWidth, head_dim - i);
    V::store_first(head + i, count, V::load_first(values + i, count));
  }
}

template <class V, class Element>
void rotary_tokens(const RotaryWriteKV& op, int begin, int end) {
  const int64_t head_dim = op.head_dim;
  for (int token = begin; token < end; ++token) {
    const int64_t slot = op.slot_mapping[token];
    if (slot < 0) continue;  // padding
    Element* row = static_cast<Element*>(op.qkv) + token * op.row_stride;
    const float* cos_sin = op.cos_sin == nullptr ? nullptr : op.cos_sin + op.positions[token] * int64_t{op.rotary_dim};
    const int rotary_dim = op.cos_sin == nullptr ? 0 : op.rotary_dim;
    for (int head = 0; head < op.num_heads + op.num_kv_heads; ++head) {
      const void* norm = head < op.num_heads ? op.q_norm : op.k_norm;
      if (rotary_dim == 0 && norm == nullptr) continue;
      float values[kMaxRotaryHeadDim];
      Element* x = row + head * head_dim;
      load_head<V>(x, op.head_dim, static_cast<const Element*>(norm), op.norm_eps, values);
      rotate_head<V>(values, cos_sin, op.head_dim, rotary_dim, x);
    }
    const Element* k = row + op.num_heads * head_dim;
    const Element* v = k + op.num_kv_heads * head_dim;
    for (int head = 0; head < op.num_kv_heads; ++head) {
      const int64_t place =
          ((slot / op.block_size * op.num_kv_heads + head) * op.block_size + slot % op.block_size) * head_dim;
      std::memcpy(static_cast<Element*>(op.k_cache) + place, k + head * head_dim, head_dim * sizeof(Element));
      std::memcpy(static_cast<Element*>(op.v_cache) + place, v + head * head_dim, head_dim * sizeof(Element));
    }
  }
}

template <class V, class BFloat16, class Float16>
RotaryTokens rotary_tokens_for(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return rotary_tokens<V, BFloat16>;
    case DType::kFloat16:
      return rotary_tokens<V, Float16>;
    default:
      return rotary_tokens<V, float>;
  }
}

}  // namespace pagedcore::cpu
