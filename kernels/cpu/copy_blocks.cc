// Whole blocks copied inside a cache or between two.
#include <cstring>

#include "cpu/thread_pool.h"
#include "ops.h"

namespace pagedcore::cpu {

void copy_blocks(const CopyBlocks& op) {
  parallel_for(op.num_planes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const char* src = static_cast<const char*>(op.src) + plane * op.src_plane_stride;
      char* dst = static_cast<char*>(op.dst) + plane * op.dst_plane_stride;
      for (int i = 0; i < op.num_pairs; ++i) {
        std::memcpy(dst + op.pairs[2 * i + 1] * op.dst_block_stride, src + op.pairs[2 * i] * op.src_block_stride,
                    op.block_bytes);
      }
    }
  });
}

}  // namespace pagedcore::cpu
