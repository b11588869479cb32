// Attention over the paged KV cache: cuts a ragged batch into tiles and runs them on the pool.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace pagedcore::cpu {
namespace {

// Lines of a tile: enough that packing a chunk of keys and values is a small part of the work on it.
constexpr int kTileLines = 96;

// Scratch memory of one thread: grows, and is kept for the next call.
class Scratch {
 public:
  float* floats(std::size_t size) {
    if (size > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64)));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = size;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  std::size_t size_ = 0;
};

std::size_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

AttentionKernel kernel_for(DType dtype) {
  switch (isa()) {
    case Isa::kAvx512Bf16:
      return dtype == DType::kBFloat16 ? attention_kernel_avx512_bf16() : attention_kernel_avx512(dtype);
    case Isa::kAvx512:
      return attention_kernel_avx512(dtype);
    case Isa::kAvx2:
      return attention_kernel_avx2(dtype);
    default:
      return attention_kernel_generic(dtype);
  }
}

// A tile whose chunks are computed separately: the thread that finishes the last one merges them.
struct SplitTile {
  AttentionTile tile;
  int64_t partials;  // where its partial states start
};

// One piece of work: a whole tile, or one chunk of a split tile.
struct WorkItem {
  AttentionTile tile;
  int split;  // index of its SplitTile; -1: none
};

struct Plan {
  bool may_split = false;
  std::vector<WorkItem> items;
  std::vector<SplitTile> splits;
  std::vector<int32_t> chunks_left;  // of each split tile
  int64_t partials_size = 0;
  int max_lines = 0;

  void clear() {
    items.clear();
    splits.clear();
    chunks_left.clear();
    partials_size = 0;
    max_lines = 0;
  }
};

// A split pays where the partial results are small beside the keys and values read for them: where few lines share the
// keys.
bool is_small(const PagedAttention& op, int num_lines) {
  const std::size_t partial_bytes = num_lines * attention_state_size(op.head_dim) * sizeof(float);
  const std::size_t chunk_bytes = 2 * kAttentionChunk * op.head_dim * dtype_size(op.dtype);
  return partial_bytes * 4 <= chunk_bytes;
}

void add_tile(const PagedAttention& op, const AttentionTile& tile, Plan* plan) {
  const int num_lines = tile.num_queries * (op.num_heads / op.num_kv_heads);
  plan->max_lines = std::max(plan->max_lines, num_lines);
  if (!plan->may_split || tile.num_chunks == 1 || !is_small(op, num_lines)) {
    plan->items.push_back({tile, -1});
    return;
  }
  const int split = static_cast<int>(plan->splits.size());
  plan->splits.push_back({tile, plan->partials_size});
  plan->chunks_left.push_back(tile.num_chunks);
  plan->partials_size += int64_t{num_lines} * attention_state_size(op.head_dim) * tile.num_chunks;
  for (int chunk = 0; chunk < tile.num_chunks; ++chunk) {
    AttentionTile part = tile;
    part.first_chunk = chunk;
    part.num_chunks = 1;
    plan->items.push_back({part, split});
  }
}

void add_row(const PagedAttention& op, int row, Plan* plan) {
  const int first_query = op.query_start_loc[row];
  const int query_len = op.query_start_loc[row + 1] - first_query;
  const int context_len = op.seq_lens[row] - query_len;
  const int tile_queries = std::max(1, kTileLines / (op.num_heads / op.num_kv_heads));
  // The last tiles see the most keys: they go first, so that the threads end together.
  for (int end = query_len; end > 0;) {
    const int begin = (end - 1) / tile_queries * tile_queries;
    for (int kv_head = 0; kv_head < op.num_kv_heads; ++kv_head) {
      const int num_chunks = (context_len + end + kAttentionChunk - 1) / kAttentionChunk;
      add_tile(op, {row, kv_head, first_query + begin, end - begin, context_len + begin, 0, num_chunks}, plan);
    }
    end = begin;
  }
}

void make_plan(const PagedAttention& op, Plan* plan) {
  plan->clear();
  plan->may_split = num_threads() > 1;
  // Rows with many queries make large pieces of work: they go first.
  for (const bool large : {true, false}) {
    for (int row = 0; row < op.num_rows; ++row) {
      const int query_len = op.query_start_loc[row + 1] - op.query_start_loc[row];
      if (op.seq_lens[row] > 0 && (query_len > 1) == large) add_row(op, row, plan);
    }
  }
}

void zero_padding(const PagedAttention& op) {
  const int64_t token_bytes = int64_t{op.num_heads} * op.head_dim * static_cast<int64_t>(dtype_size(op.dtype));
  const auto zero = [&](int begin, int end) {
    std::memset(static_cast<char*>(op.out) + begin * token_bytes, 0, (end - begin) * token_bytes);
  };
  for (int row = 0; row < op.num_rows; ++row) {
    if (op.seq_lens[row] == 0) zero(op.query_start_loc[row], op.query_start_loc[row + 1]);
  }
  zero(op.query_start_loc[op.num_rows], op.num_tokens);
}

}  // namespace

void paged_attention(const PagedAttention& op) {
  if (op.num_tokens == 0) return;
  thread_local Plan plan;
  thread_local Scratch partials_memory;
  make_plan(op, &plan);
  zero_padding(op);
  const AttentionKernel kernel = kernel_for(op.dtype);
  const std::size_t scratch_size = kernel.scratch_size(op, plan.max_lines);
  float* partials = partials_memory.floats(plan.partials_size);
  // The lambda runs on other threads: `plan` there would be theirs.
  Plan& shared = plan;
  parallel_for(static_cast<int64_t>(shared.items.size()), 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    float* memory = scratch.floats(scratch_size);
    for (int64_t i = begin; i < end; ++i) {
      const WorkItem& item = shared.items[i];
      const AttentionTile next = i + 1 < end ? shared.items[i + 1].tile : AttentionTile{};
      if (item.split < 0) {
        kernel.compute(op, item.tile, next, memory, nullptr);
        continue;
      }
      const SplitTile& whole = shared.splits[item.split];
      const int64_t num_lines = item.tile.num_queries * (op.num_heads / op.num_kv_heads);
      float* tile_partials = partials + whole.partials;
      kernel.compute(op, item.tile, next, memory,
                     tile_partials + item.tile.first_chunk * num_lines * attention_state_size(op.head_dim));
      std::atomic_ref<int32_t> chunks_left(shared.chunks_left[item.split]);
      if (chunks_left.fetch_sub(1, std::memory_order_acq_rel) == 1) kernel.combine(op, whole.tile, tile_partials);
    }
  });
}

}  // namespace pagedcore::cpu
