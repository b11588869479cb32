// The kernels' common interface: raw pointers, sizes and strides. The same structs go to `cpu::` and `cuda::`.
//
// Nothing here knows torch or Python. `pagedcore/ops` has checked shape, dtype, contiguity and device before a call
// gets here.
//
// KV cache of one layer: K and V each [num_blocks, num_kv_heads, block_size, head_dim], contiguous.
// A slot is `block * block_size + offset`; slot -1 marks padding: it is never written.
#pragma once

#include <cstdint>

namespace pagedcore {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Rotate q and k (RoPE), after an optional per-head RMSNorm, in place, and write k and v into their slots.
struct RotaryWriteKV {
  void* qkv;  // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], rows `row_stride` elements apart: q, k, v
  const float* cos_sin;  // [max_position, rotary_dim]: rotary_dim / 2 cosines, then as many sines; null: no rotation
  const void* q_norm;    // [head_dim] or null (Qwen3)
  const void* k_norm;    // [head_dim] or null
  void* k_cache;         // one layer
  void* v_cache;         // one layer
  const int32_t* positions;     // [num_tokens]
  const int32_t* slot_mapping;  // [num_tokens]
  int64_t row_stride;
  int32_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, block_size;
  float norm_eps;
  DType dtype;
};

// Causal attention of a ragged batch, reading the block table in place (PagedAttention, section 4.1).
// Row r has the queries [query_start_loc[r], query_start_loc[r + 1]), which are the last ones of its seq_lens[r]
// tokens. A row of seq_len 0 is padding: its output is zero. CUDA reads block_tables, query_start_loc and seq_lens
// before the kernel ahead of it on the stream has ended: that one must not write them.
struct PagedAttention {
  void* out;                       // [num_tokens, num_heads, head_dim], contiguous
  const void* q;                   // [num_tokens, num_heads, head_dim], rows `q_row_stride` elements apart
  const void* k_cache;             // one layer
  const void* v_cache;             // one layer
  const int32_t* block_tables;     // [num_rows, table_stride]
  const int32_t* query_start_loc;  // [num_rows + 1]
  const int32_t* seq_lens;         // [num_rows]
  void* workspace;                 // CUDA: partial results of a split over the KV, zeroed before its first use
  int64_t workspace_bytes;
  int64_t q_row_stride;
  int32_t num_tokens, num_rows, table_stride;
  int32_t num_heads, num_kv_heads, head_dim, block_size;
  int32_t max_query_len;
  float scale;
  DType dtype;
  bool batch_invariant;  // CUDA: a query's bits are the same whatever else is computed; on a CPU they always are
};

// Copy whole blocks. Copy-on-write inside a cache (src == dst) and swapping between device and host are the same
// operation. A cache has `num_planes` planes (K and V of each layer); a block of a plane is `block_bytes` contiguous
// bytes.
struct CopyBlocks {
  const void* src;
  void* dst;
  const int32_t* pairs;  // [num_pairs, 2]: source block, destination block
  int64_t src_plane_stride, src_block_stride, dst_plane_stride, dst_block_stride;  // bytes
  int64_t block_bytes;
  int32_t num_pairs, num_planes;
};

// residual += x (where there is a residual); out = residual / rms(residual) * weight. Rows are contiguous.
struct RMSNorm {
  void* out;           // [num_tokens, hidden_size]
  const void* x;       // [num_tokens, hidden_size]
  void* residual;      // [num_tokens, hidden_size], updated in place; null: normalize x itself
  const void* weight;  // [hidden_size]
  int32_t num_tokens, hidden_size;
  float eps;
  DType dtype;
};

// residual += x (where there is a residual); out = (residual - mean(residual)) / deviation(residual) * weight + bias.
// Rows are contiguous.
struct LayerNorm {
  void* out;           // [num_tokens, hidden_size]; may be the residual
  const void* x;       // [num_tokens, hidden_size]
  void* residual;      // [num_tokens, hidden_size], updated in place; null: normalize x itself
  const void* weight;  // [hidden_size]
  const void* bias;    // [hidden_size]
  int32_t num_tokens, hidden_size;
  float eps;
  DType dtype;
};

// out = silu(gate) * up, where x holds [gate | up] in each row.
struct SiluAndMul {
  void* out;      // [num_tokens, size]
  const void* x;  // [num_tokens, 2 * size]
  int32_t num_tokens, size;
  DType dtype;
};

// out = max(x, 0).
struct Relu {
  void* out;      // [num_tokens, size]; may be x
  const void* x;  // [num_tokens, size]
  int32_t num_tokens, size;
  DType dtype;
};

// Columns of one row of sampling parameters (int32; floats are bit patterns). See pagedcore/engine/step_plan.py.
enum SamplingColumn : int32_t {
  kTemperature = 0,  // float; 0: greedy
  kTopK = 1,         // 0: all
  kTopP = 2,         // float; 1: all
  kMinP = 3,         // float; 0: all
  kSeedLow = 4,
  kSeedHigh = 5,
  kDrawIndex = 6,    // index of the output token being drawn: the counter of the stateless RNG
  kNumLogprobs = 7,  // -1: none; else how many of the most likely tokens to report beside the sampled one
  kNumSamplingColumns = 8
};

// Draw one token for each row. Stateless: the uniform of vocabulary entry v is Philox4x32-10 with key = seed and
// counter = (v / 4, draw index, 0, 0), word v % 4; the token is argmax(logit / temperature + Gumbel(u)) over the
// entries that top-k, then top-p, then min-p keep (in that order, each on the distribution the one before left; ties at
// a threshold are kept).
struct Sample {
  const float* logits;        // [num_rows, vocab_size], rows `row_stride` apart; penalties and bans already applied
  const int32_t* parameters;  // [num_rows, kNumSamplingColumns]
  int32_t* token_ids;         // [num_rows] out
  int64_t row_stride;
  int32_t num_rows, vocab_size;
};

// Log probabilities of unmodified logits: of the chosen token, its rank (1: most likely), and of the `num_top` most
// likely ones.
struct Logprobs {
  const float* logits;       // [num_rows, vocab_size], rows `row_stride` apart
  const int32_t* token_ids;  // [num_rows]
  float* chosen;             // [num_rows] out
  int32_t* rank;             // [num_rows] out
  float* top;                // [num_rows, num_top] out, descending; equal values by lower token id
  int32_t* top_ids;          // [num_rows, num_top] out
  int64_t row_stride;
  int32_t num_rows, vocab_size, num_top;
};

// y = x W^T (+ bias) for a weight that `pack_linear` has laid out for this processor. fp32 accumulation.
struct PackedLinear {
  void* y;             // [num_tokens, out_features], rows `y_row_stride` elements apart
  const void* x;       // [num_tokens, in_features], rows `x_row_stride` elements apart
  const void* packed;  // packed weight
  const void* bias;    // [out_features] or null, same dtype as x
  int64_t x_row_stride, y_row_stride;
  int32_t num_tokens, in_features, out_features;
  DType dtype;    // of x, weight and bias
  DType y_dtype;  // of y: dtype, or float32 (logits)
};

// y = x W^T (+ bias) for up to 32 rows of x, by reading the weight at the speed of the memory. fp32 accumulation in an
// order that depends on nothing but the shape. Gated: y = silu(x W1^T) * (x W2^T), W1 and W2 the halves of W.
struct SkinnyLinear {
  void* y;             // [num_tokens, out_features], or half as wide where gated; contiguous
  const void* x;       // [num_tokens, in_features], rows `x_row_stride` elements apart
  const void* weight;  // [out_features, in_features], contiguous
  const void* bias;    // [out_features] or null, same dtype as x
  int64_t x_row_stride;
  int32_t num_tokens, in_features, out_features;
  DType dtype;    // of x, weight and bias: 16 bits wide
  DType y_dtype;  // of y: dtype, or float32 (logits)
  bool is_gated;  // without bias, y_dtype = dtype
};

// All that it takes to start a captured step: the copy of its inputs to the device, its graph, the copy of what it
// draws to the host, and the event behind that.
struct EnqueueStep {
  void* packed;             // on the device
  const void* host_packed;  // pinned, as are the tokens' destination
  int64_t packed_bytes;
  void* graph;  // cudaGraphExec_t
  void* host_tokens;
  const void* tokens;  // on the device
  int64_t token_bytes;
  void* event;  // cudaEvent_t
};

// Spread a step's packed buffer (pagedcore/engine/step_plan.py: StepLayout), as it came from the host, to where the
// step's kernels read it. The table's width is read from the buffer's header, so one captured launch serves every
// width.
struct UnpackStep {
  const int32_t* packed;          // the packed buffer
  const int32_t* last_token_ids;  // what the step before drew, by row
  int32_t* token_ids;             // [num_tokens] out: an id -1 - r of the buffer stands for last_token_ids[r]
  int32_t* block_tables;          // [num_rows, table_stride] out; entries behind the buffer's width are left alone
  int32_t* sampling;              // [num_rows, kNumSamplingColumns] out
  int32_t num_tokens, num_rows, table_stride;
};

namespace cpu {
// All CPU kernels run on the library's own threads (cpu/thread_pool.h) and return when the work is done.
void rotary_write_kv(const RotaryWriteKV&);
void paged_attention(const PagedAttention&);
void copy_blocks(const CopyBlocks&);
void rms_norm(const RMSNorm&);
void layer_norm(const LayerNorm&);
void silu_and_mul(const SiluAndMul&);
void relu(const Relu&);
void sample(const Sample&);
void logprobs(const Logprobs&);
int64_t packed_linear_bytes(int32_t out_features, int32_t in_features, DType dtype);
void pack_linear(void* packed, const void* weight, int32_t out_features, int32_t in_features,
                 DType dtype);  // weight: [out, in]
void packed_linear(const PackedLinear&);
void request_huge_pages(void* start,
                        int64_t num_bytes);  // for memory not touched yet; a hint that the system may ignore
void set_num_threads(int32_t);
int32_t num_threads();
const char* instruction_set();  // "avx512_bf16", "avx512", "avx2" or "generic"
}  // namespace cpu

#ifdef PAGEDCORE_WITH_CUDA
namespace cuda {
// Every call only enqueues on `stream`; `sample` and the rest never synchronize with the host.
using Stream = void*;
void rotary_write_kv(const RotaryWriteKV&, Stream);
void paged_attention(const PagedAttention&, Stream);
int64_t paged_attention_workspace_bytes(int32_t num_heads, int32_t num_kv_heads, int32_t head_dim);
void copy_blocks(const CopyBlocks&, Stream);
void rms_norm(const RMSNorm&, Stream);
void layer_norm(const LayerNorm&, Stream);
void silu_and_mul(const SiluAndMul&, Stream);
void relu(const Relu&, Stream);
void sample(const Sample&, Stream);
void logprobs(const Logprobs&, Stream);
void skinny_linear(const SkinnyLinear&, Stream);
bool has_skinny_linear();  // on compute capability 9.0 and later
void unpack_step(const UnpackStep&, Stream);
void enqueue_step(const EnqueueStep&, Stream);
}  // namespace cuda
#endif

}  // namespace pagedcore
