// Attention of one tile, written once over a vector type. Included by one file per instruction set.
//
// A tile goes over the row's context chunk by chunk, and over a chunk in sub-blocks of tokens. A sub-block's keys are
// transposed, or its values copied, into scratch once, in "words" of 32 bits (one float, or two bfloat16 that one
// instruction multiplies and adds). Then scores = q k^T and sums += weights v run on all lines as products of small
// matrices in registers; between the two, weights = exp(scores - max). Decoding and prefill take the same way through
// the same instructions, so a token's result does not depend on how many tokens were computed with it.
//
// The including file defines, in its unnamed namespace so that no two files share a symbol, a `Math` with
//   Vector                                 a vector_*.h type with what attention_generic.cc adds to it
//   Element                                type of q, k, v and out in memory
//   kElementsPerWord                       1 or 2
//   load_words(const Element*, n)          kWidth words (zero behind the first n) of a row
//   multiply_add(a, b, sum)                per lane: sum + product of the words
//   pack_values(rows, head_dim, out)       kWidth rows of values -> [kWidth / kElementsPerWord, head_dim] words
//   store_weights(words, lane, weights)    kWidth weights -> words
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/attention.h"
#include "cpu/attention_math.h"

namespace pagedcore::cpu {

template <class Math>
class TileAttention {
 public:
  static std::size_t scratch_size(const PagedAttention& op, int num_lines) {
    return TileAttention(op, AttentionTile{}, nullptr, num_lines).scratch_used_;
  }

  static void compute(const PagedAttention& op, const AttentionTile& tile, const AttentionTile& next, float* scratch,
                      float* partial) {
    TileAttention self(op, tile, scratch, tile.num_queries * (op.num_heads / op.num_kv_heads));
    self.load_queries();
    float* states = partial != nullptr ? partial : self.states_;
    const int last_chunk = tile.first_chunk + tile.num_chunks - 1;
    for (int chunk = tile.first_chunk; chunk <= last_chunk; ++chunk) {
      float* chunk_states = chunk == tile.first_chunk ? states : self.chunk_states_;
      self.score_keys(chunk);
      self.weigh_scores(chunk, chunk_states);
      if (chunk < last_chunk) {
        self.sum_values(chunk, chunk_states, tile, chunk + 1);
      } else {
        self.sum_values(chunk, chunk_states, next, next.first_chunk);
      }
      if (chunk != tile.first_chunk) self.merge_chunk(states, chunk_states, chunk);
    }
    if (partial == nullptr) self.write_output(states);
  }

  static void combine(const PagedAttention& op, const AttentionTile& tile, float* partials) {
    TileAttention self(op, tile, nullptr, tile.num_queries * (op.num_heads / op.num_kv_heads));
    for (int chunk = 1; chunk < tile.num_chunks; ++chunk) {
      const float* states = partials + chunk * self.num_lines_ * self.state_size_;
      self.merge_chunk(partials, states, chunk);
    }
    self.write_output(partials);
  }

 private:
  using V = typename Math::Vector;
  using Reg = typename V::Reg;
  using Element = typename Math::Element;
  static constexpr int kWidth = V::kWidth;
  static constexpr int kPerWord = Math::kElementsPerWord;
  static constexpr int kSubBlock = 64;  // tokens of a chunk that are packed at a time: they stay in the L1 cache

  TileAttention(const PagedAttention& op, const AttentionTile& tile, float* scratch, int num_lines)
      : op_(op),
        tile_(tile),
        group_(op.num_heads / op.num_kv_heads),
        num_lines_(num_lines),
        words_(op.head_dim / kPerWord),
        padded_words_((words_ + kWidth - 1) / kWidth * kWidth),
        block_shift_(std::countr_zero(static_cast<uint32_t>(op.block_size))),
        state_size_(attention_state_size(op.head_dim)),
        exponent_scale_(op.scale * 1.44269504f),
        scratch_(scratch) {
    keys_ = take(kSubBlock * padded_words_);
    values_ = take(kSubBlock / kPerWord * op.head_dim);
    rows_ = reinterpret_cast<Element*>(take(kWidth * op.head_dim));
    queries_ = take(num_lines * words_);
    scores_ = take(num_lines * kAttentionChunk);
    states_ = take(num_lines * state_size_);
    chunk_states_ = take(num_lines * state_size_);
  }

  float* take(int64_t size) {
    float* start = scratch_ == nullptr ? nullptr : scratch_ + scratch_used_;
    scratch_used_ += (size + 15) / 16 * 16;
    return start;
  }

  int position(int line) const { return tile_.first_position + line / group_; }

  // Keys of a chunk that a line sees; zero or less when it sees none.
  int num_visible(int line, int chunk) const {
    return std::min(position(line) + 1 - chunk * kAttentionChunk, kAttentionChunk);
  }

  void load_queries() {
    for (int line = 0; line < num_lines_; ++line) {
      const Element* query = static_cast<const Element*>(op_.q) +
                             (tile_.first_query + line / group_) * op_.q_row_stride +
                             (tile_.kv_head * group_ + line % group_) * int64_t{op_.head_dim};
      for (int word = 0; word < words_; word += kWidth) {
        const int num_words = std::min(words_ - word, kWidth);
        V::store_first(queries_ + line * words_ + word, num_words,
                       Math::load_words(query + word * kPerWord, num_words));
      }
    }
  }

  const Element* find_token(const void* cache, const AttentionTile& tile, int position) const {
    const int64_t block = op_.block_tables[tile.row * int64_t{op_.table_stride} + (position >> block_shift_)];
    const int64_t slot = (block * op_.num_kv_heads + tile.kv_head) << block_shift_ | (position & (op_.block_size - 1));
    return static_cast<const Element*>(cache) + slot * op_.head_dim;
  }

  // The rows [kWidth, head_dim] of the tokens from `position` on, in the cache itself where they lie there side by
  // side. Rows from `end` on are zero: unused slots may hold anything, and zero times NaN is not zero.
  const Element* find_rows(const void* cache, int position, int end) {
    if (op_.block_size >= kWidth && position + kWidth <= end) return find_token(cache, tile_, position);
    for (int i = 0; i < kWidth; ++i) {
      Element* row = rows_ + i * op_.head_dim;
      if (position + i < end) {
        std::memcpy(row, find_token(cache, tile_, position + i), op_.head_dim * sizeof(Element));
      } else {
        std::memset(static_cast<void*>(row), 0, op_.head_dim * sizeof(Element));
      }
    }
    return rows_;
  }

  // Positions [begin, begin + size) of a chunk that a tile's last query sees.
  struct Span {
    int begin, size;
  };
  static Span span_of(const AttentionTile& tile, int chunk) {
    const int begin = chunk * kAttentionChunk;
    return {begin, std::min(tile.first_position + tile.num_queries - begin, kAttentionChunk)};
  }

  // Rows that are needed soon. They are fetched a sub-block ahead: early enough for memory, late enough to find room in
  // the L1 cache.
  struct Ahead {
    const void* cache;
    const AttentionTile& tile;
    int position;
    int end;

    Ahead(const void* cache_, const AttentionTile& tile_, const Span& span, int first)
        : cache(cache_),
          tile(tile_),
          position(span.begin + first),
          end(span.begin + std::min(first + kSubBlock, span.size)) {}
  };

  // Inlined always: GCC takes a function that only prefetches for one without effect, and drops calls to it.
  [[gnu::always_inline]] void prefetch_rows(Ahead* ahead) const {
    if (op_.block_size < kWidth || ahead->position >= ahead->end) return;
    const char* rows = reinterpret_cast<const char*>(find_token(ahead->cache, ahead->tile, ahead->position));
    const int num_bytes = kWidth * op_.head_dim * static_cast<int>(sizeof(Element));
    for (int byte = 0; byte < num_bytes; byte += 64) __builtin_prefetch(rows + byte);
    ahead->position += kWidth;
  }

  // Scores of a chunk's keys.
  void score_keys(int chunk) {
    const Span span = span_of(tile_, chunk);
    for (int first = 0; first < span.size; first += kSubBlock) {
      const int count = std::min(kSubBlock, span.size - first);
      const bool last = first + kSubBlock >= span.size;
      Ahead ahead(last ? op_.v_cache : op_.k_cache, tile_, span, last ? 0 : first + kSubBlock);
      float* out = keys_;
      for (int token = first; token < first + count; token += kWidth) {
        prefetch_rows(&ahead);
        const Element* rows = find_rows(op_.k_cache, span.begin + token, span.begin + span.size);
        for (int word = 0; word < words_; word += kWidth, out += kWidth * kWidth) {
          transpose_keys(rows + word * kPerWord, std::min(words_ - word, kWidth), out);
        }
      }
      for (int line = 0; line < num_lines_; line += V::kMaxRows) {
        const int num_rows = std::min(V::kMaxRows, num_lines_ - line);
        const int visible = std::min(num_visible(line + num_rows - 1, chunk) - first, count);
        if (visible <= 0) continue;
        multiply<Math>({.a = queries_ + line * words_,
                        .a_stride = words_,
                        .b = keys_,
                        .b_step_stride = kWidth,
                        .b_vector_stride = padded_words_ * kWidth,
                        .c = scores_ + line * kAttentionChunk + first,
                        .c_stride = kAttentionChunk,
                        .steps = words_,
                        .accumulate = false},
                       num_rows, (visible + kWidth - 1) / kWidth);
      }
    }
  }

  void transpose_keys(const Element* rows, int num_words, float* out) const {
    Reg square[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) square[i] = Math::load_words(rows + i * op_.head_dim, num_words);
    V::transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) V::store(out + i * kWidth, square[i]);
  }

  // Weighted sums of a chunk's values.
  void sum_values(int chunk, float* states, const AttentionTile& next, int next_chunk) {
    const Span span = span_of(tile_, chunk);
    const Span next_span = span_of(next, next_chunk);
    for (int first = 0; first < span.size; first += kSubBlock) {
      const int count = std::min(kSubBlock, span.size - first);
      const bool last = first + kSubBlock >= span.size;
      Ahead ahead(last ? op_.k_cache : op_.v_cache, last ? next : tile_, last ? next_span : span,
                  last ? 0 : first + kSubBlock);
      for (int token = first; token < first + count; token += kWidth) {
        prefetch_rows(&ahead);
        Math::pack_values(find_rows(op_.v_cache, span.begin + token, span.begin + span.size), op_.head_dim,
                          values_ + (token - first) / kPerWord * op_.head_dim);
      }
      for (int line = 0; line < num_lines_; line += V::kMaxRows) {
        const int num_rows = std::min(V::kMaxRows, num_lines_ - line);
        const int visible = std::min(num_visible(line + num_rows - 1, chunk) - first, count);
        if (visible <= 0) continue;
        multiply<Math>({.a = scores_ + line * kAttentionChunk + first / kPerWord,
                        .a_stride = kAttentionChunk,
                        .b = values_,
                        .b_step_stride = op_.head_dim,
                        .b_vector_stride = kWidth,
                        .c = states + line * state_size_,
                        .c_stride = state_size_,
                        .steps = (visible + kPerWord - 1) / kPerWord,
                        .accumulate = first > 0},
                       num_rows, op_.head_dim / kWidth);
      }
    }
  }

  // Turns the scores into weights, in place.
  void weigh_scores(int chunk, float* states) {
    for (int line = 0; line < num_lines_; ++line) {
      const int last_of_group = std::min(line / V::kMaxRows * V::kMaxRows + V::kMaxRows, num_lines_) - 1;
      softmax(scores_ + line * kAttentionChunk, num_visible(line, chunk), num_visible(last_of_group, chunk),
              states + line * state_size_ + op_.head_dim);
    }
  }

  // The weights of the `visible` first scores take the scores' place, with zeros up to `count`; statistics: the largest
  // score, the sum of the weights.
  // A NaN among the scores does not show in the maximum but makes the weights, and so the output, NaN.
  void softmax(float* scores, int visible, int count, float* statistics) const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    Reg largest = V::set1(-kInfinity);
    for (int i = 0; i < visible; i += kWidth) {
      largest = V::max(V::first_lanes(V::load(scores + i), visible - i, -kInfinity), largest);
    }
    statistics[0] = V::largest_lane(largest);
    const Reg shift = V::set1(statistics[0]);
    const Reg scale = V::set1(exponent_scale_);
    Reg sum = V::set1(0.0f);
    for (int i = 0; i < count; i += kWidth) {
      const Reg weight = exp2_vector<V>(V::mul(V::sub(V::load(scores + i), shift), scale));
      const Reg visible_weight = V::first_lanes(weight, visible - i, 0.0f);
      sum = V::add(sum, visible_weight);
      Math::store_weights(scores, i, visible_weight);
    }
    statistics[1] = V::sum(sum);
  }

  // Adds the lines' states of a chunk to what earlier chunks gave.
  void merge_chunk(float* states, const float* chunk_states, int chunk) const {
    for (int line = 0; line < num_lines_; ++line, states += state_size_, chunk_states += state_size_) {
      if (num_visible(line, chunk) <= 0) continue;
      float* statistics = states + op_.head_dim;
      const float* chunk_statistics = chunk_states + op_.head_dim;
      const float largest = std::max(statistics[0], chunk_statistics[0]);
      const float factor = std::exp2((statistics[0] - largest) * exponent_scale_);
      const float chunk_factor = std::exp2((chunk_statistics[0] - largest) * exponent_scale_);
      statistics[0] = largest;
      statistics[1] = std::fma(chunk_statistics[1], chunk_factor, statistics[1] * factor);
      for (int j = 0; j < op_.head_dim; j += kWidth) {
        const Reg scaled = V::mul(V::load(states + j), V::set1(factor));
        V::store(states + j, V::fma(V::load(chunk_states + j), V::set1(chunk_factor), scaled));
      }
    }
  }

  void write_output(const float* states) const {
    for (int line = 0; line < num_lines_; ++line, states += state_size_) {
      const int64_t head =
          (tile_.first_query + line / group_) * int64_t{op_.num_heads} + tile_.kv_head * group_ + line % group_;
      Element* out = static_cast<Element*>(op_.out) + head * op_.head_dim;
      const Reg factor = V::set1(1.0f / states[op_.head_dim + 1]);
      for (int j = 0; j < op_.head_dim; j += kWidth) V::store(out + j, V::mul(V::load(states + j), factor));
    }
  }

  const PagedAttention& op_;
  const AttentionTile& tile_;
  const int group_;  // query heads that share a KV head
  const int num_lines_;
  const int words_;  // of a query or key
  const int padded_words_;
  const int block_shift_;
  const int state_size_;
  const float exponent_scale_;  // the softmax is computed to base 2
  float* const scratch_;
  std::size_t scratch_used_ = 0;
  float* keys_;          // [kSubBlock / kWidth, padded words, kWidth] words
  float* values_;        // [kSubBlock / kPerWord, head_dim] words
  Element* rows_;        // [kWidth, head_dim]
  float* queries_;       // [lines, words] words
  float* scores_;        // [lines, chunk], then weights in words
  float* states_;        // [lines, state size]
  float* chunk_states_;  // [lines, state size]
};

template <class Math>
AttentionKernel make_attention_kernel() {
  return {TileAttention<Math>::scratch_size, TileAttention<Math>::compute, TileAttention<Math>::combine};
}

// A word is a float, whatever the elements in memory are.
template <class VectorType, class ElementType>
struct FloatMath {
  using Vector = VectorType;
  using Element = ElementType;
  using Reg = typename Vector::Reg;
  static constexpr int kElementsPerWord = 1;

  static Reg load_words(const Element* p, int) { return Vector::load(p); }
  static Reg multiply_add(Reg a, Reg b, Reg sum) { return Vector::fma(a, b, sum); }
  static void pack_values(const Element* rows, int head_dim, float* out) {
    for (int i = 0; i < Vector::kWidth * head_dim; i += Vector::kWidth) Vector::store(out + i, Vector::load(rows + i));
  }
  static void store_weights(float* words, int lane, Reg weights) { Vector::store(words + lane, weights); }
};

template <class Vector, class BFloat16, class Float16>
AttentionKernel float_attention_kernel(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return make_attention_kernel<FloatMath<Vector, BFloat16>>();
    case DType::kFloat16:
      return make_attention_kernel<FloatMath<Vector, Float16>>();
    default:
      return make_attention_kernel<FloatMath<Vector, float>>();
  }
}

}  // namespace pagedcore::cpu
