// Huge pages for memory that is read from end to end again and again.
#include <cstdint>

#include "ops.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pagedcore::cpu {

void request_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t num_bytes) {
#ifdef __linux__
  const auto page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(start) + page_size - 1) / page_size * page_size;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(num_bytes)) / page_size * page_size;
  // A kernel without huge pages refuses; the memory is as good as it was.
  if (begin < end) static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#endif
}

}  // namespace pagedcore::cpu
