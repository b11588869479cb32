// Attention over the paged KV cache: checks, then decode and prefill kernels for the rows that are theirs.
#include "decode_attention.cuh"

namespace pagedcore::cuda {
namespace {

void require(bool condition, const char* field, const char* rule, int value) {
  if (!condition) throw std::invalid_argument(std::string(field) + ": " + rule + ", got " + std::to_string(value));
}

template <typename T>
void run(const PagedAttention& a, Stream stream) {
  decode<T>(a, stream);  // where it has no rows, for the padding
  if (a.max_query_len > 1 || a.batch_invariant) prefill<T>(a, stream);
}

}  // namespace

AttentionPlan plan_attention(const PagedAttention& a) {
  AttentionPlan plan{};
  while ((1 << plan.block_shift) < a.block_size) ++plan.block_shift;
  plan.heads_per_kv = a.num_heads / a.num_kv_heads;
  plan.kv_stride = int64_t{a.block_size} * a.head_dim;
  return plan;
}

void paged_attention(const PagedAttention& a, Stream stream) {
  if (a.num_tokens == 0) return;
  require(a.block_size >= 16 && (a.block_size & (a.block_size - 1)) == 0, "block_size",
          "the CUDA attention kernels need a power of two of at least 16", a.block_size);
  require(a.num_kv_heads > 0 && a.num_heads % a.num_kv_heads == 0, "num_heads", "must be a multiple of num_kv_heads",
          a.num_heads);
  switch (a.dtype) {
    case DType::kBFloat16:
      return run<__nv_bfloat16>(a, stream);
    case DType::kFloat16:
      return run<__half>(a, stream);
    case DType::kFloat32:
      break;
  }
  throw std::invalid_argument("dtype: the CUDA attention kernels support bfloat16 and float16");
}

int64_t paged_attention_workspace_bytes(int32_t num_heads, int32_t num_kv_heads, int32_t head_dim) {
  int64_t bytes = 0;
  dispatch_head_dim(head_dim, [&](auto dim) {
    const auto of = [](auto config) {
      using Config = decltype(config);
      return Config::workspace_bytes(device_info().num_multiprocessors * Config::kBlocksPerMultiprocessor);
    };
    bytes = num_heads / num_kv_heads <= 8 ? of(Decode<__half, dim.value, 1, false>{})
                                          : of(Decode<__half, dim.value, 2, false>{});
  });
  return bytes;
}

}  // namespace pagedcore::cuda
