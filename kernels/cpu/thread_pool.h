// The CPU kernels' own threads: one pool for the process, used by one caller at a time.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pagedcore::cpu {

// A reference to a callable (begin, end): two words, no allocation, valid while the callable lives.
class RangeFunction {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, RangeFunction>>>
  RangeFunction(const F& function)  // NOLINT: callers pass lambdas
      : object_(&function),
        call_([](const void* object, int64_t begin, int64_t end) { (*static_cast<const F*>(object))(begin, end); }) {}

  void operator()(int64_t begin, int64_t end) const { call_(object_, begin, end); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t, int64_t);
};

// Run fn(begin, end) over a partition of [0, n), `grain` items or more to a piece (the last one may be smaller), on the
// pool's threads and the calling one; returns when all is done. Pieces are handed out dynamically, large ones first, so
// a thread whose core is taken by a neighbour does not hold up the others. Waiting threads spin for a bounded time,
// then sleep: a busy neighbour costs its share of the core and no more. Calls from several threads take turns. What
// `fn` throws, on whatever thread, is thrown here when all pieces have been tried: the first of it. `fn` must not call
// parallel_for. n: at most 2^32 - 1.
void parallel_for(int64_t n, int64_t grain, RangeFunction fn);

}  // namespace pagedcore::cpu
