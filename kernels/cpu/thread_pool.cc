#include "cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ops.h"

#ifdef __linux__
#include <sched.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace pagedcore::cpu {
namespace {

// Long enough to bridge the gap between the kernels of a step, short against a scheduler's time slice.
constexpr std::chrono::microseconds kSpinTime{50};
constexpr int kPausesPerClockRead = 32;
constexpr size_t kCacheLine = 64;

void pause() {
#ifdef __x86_64__
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Whether `done` became true within kSpinTime.
template <class Done>
bool spin_until(const Done& done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

int32_t available_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
}

// The part of a job that a thread has not begun: items [begin, end) in one word. Its thread takes from the front,
// others from the back.
class alignas(kCacheLine) ItemRange {
 public:
  void assign(uint32_t begin, uint32_t end) { word_.store(join(begin, end), std::memory_order_relaxed); }

  // Half of what is left, `grain` items at least: long runs at first, an even finish.
  template <class Body>
  void take_all(bool from_front, uint32_t grain, const Body& body) {
    uint64_t word = word_.load(std::memory_order_relaxed);
    while (true) {
      const auto begin = static_cast<uint32_t>(word >> 32), end = static_cast<uint32_t>(word);
      if (begin == end) return;
      const uint32_t taken = std::min(end - begin, std::max(grain, (end - begin) / 2));
      const uint64_t rest = from_front ? join(begin + taken, end) : join(begin, end - taken);
      if (!word_.compare_exchange_weak(word, rest, std::memory_order_relaxed)) continue;
      if (from_front) {
        body(begin, begin + taken);
      } else {
        body(end - taken, end);
      }
      word = word_.load(std::memory_order_relaxed);
    }
  }

 private:
  static uint64_t join(uint32_t begin, uint32_t end) { return (static_cast<uint64_t>(begin) << 32) | end; }

  std::atomic<uint64_t> word_{0};
};

// Owns the worker threads and the one job they work on.
//
// A worker enters a job by adding itself to `gate_`, which must be open, and leaves by taking itself off. The caller
// opens the gate when the job is described, works, closes it when no item is left and waits until the last worker has
// left: then all items are done, and nobody reads the description any more. It never waits for a thread that has not
// woken up: the others take that one's items.
class ThreadPool {
 public:
  ThreadPool() : num_threads_(available_cores()) {}

  int32_t num_threads() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return num_threads_;
  }

  void set_num_threads(int32_t num_threads) {
    if (num_threads < 1)
      throw std::invalid_argument("num_threads must be 1 or more, got " + std::to_string(num_threads));
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_workers();
    num_threads_ = num_threads;
  }

  void run(int64_t n, int64_t grain, RangeFunction fn) {
    if (n > std::numeric_limits<uint32_t>::max()) throw std::invalid_argument("parallel_for: too many items");
    const std::lock_guard<std::mutex> lock(mutex_);
    if (num_threads_ == 1) return fn(0, n);
    if (workers_.empty()) start_workers();
    wait_for_empty_gate();  // of a worker that came too late for the job before
    fn_ = &fn;
    grain_ = static_cast<uint32_t>(std::clamp<int64_t>(grain, 1, n));
    for (int32_t i = 0; i < num_threads_; ++i) {
      ranges_[i].assign(static_cast<uint32_t>(n * i / num_threads_), static_cast<uint32_t>(n * (i + 1) / num_threads_));
    }
    gate_.fetch_add(kOpen);
    signal_.fetch_add(1);
    signal_.notify_all();
    work(0);
    gate_.fetch_sub(kOpen);
    wait_for_empty_gate();
    if (has_failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  static constexpr uint32_t kOpen = 1u << 31;  // gate_: this bit, and the number of workers inside

  // Thread `index` does its own items, then those the others have not begun.
  void work(int32_t index) {
    const auto body = [this](uint32_t begin, uint32_t end) {
      try {
        (*fn_)(begin, end);
      } catch (...) {
        if (!has_failed_.exchange(true)) error_ = std::current_exception();
      }
    };
    for (int32_t i = 0; i < num_threads_; ++i) ranges_[(index + i) % num_threads_].take_all(i == 0, grain_, body);
  }

  void wait_for_empty_gate() {
    if (spin_until([&] { return gate_.load(std::memory_order_acquire) == 0; })) return;
    for (uint32_t inside; (inside = gate_.load(std::memory_order_acquire)) != 0;) gate_.wait(inside);
  }

  void worker(int32_t index) {
    while (true) {
      const uint32_t seen =
          signal_.load(std::memory_order_acquire);  // before looking for work: what comes later changes it
      if (stop_.load(std::memory_order_acquire)) return;
      if ((gate_.fetch_add(1, std::memory_order_acq_rel) & kOpen) != 0) work(index);
      gate_.fetch_sub(1, std::memory_order_acq_rel);
      gate_.notify_one();
      if (!spin_until([&] { return signal_.load(std::memory_order_acquire) != seen; })) signal_.wait(seen);
    }
  }

  void start_workers() {
    ranges_ = std::make_unique<ItemRange[]>(num_threads_);
    for (int32_t i = 1; i < num_threads_; ++i) workers_.emplace_back([this, i] { worker(i); });
  }

  void stop_workers() {
    stop_.store(true, std::memory_order_release);
    signal_.fetch_add(1);
    signal_.notify_all();
    for (std::thread& thread : workers_) thread.join();
    workers_.clear();
    stop_.store(false, std::memory_order_release);
  }

  std::mutex mutex_;  // held by the thread whose job it is
  std::vector<std::thread> workers_;
  std::atomic<bool> stop_{false};
  // The job, and the counter that tells of it: what a waking worker reads lies in one line.
  alignas(kCacheLine) std::atomic<uint32_t> signal_{0};
  uint32_t grain_ = 1;
  int32_t num_threads_;
  const RangeFunction* fn_ = nullptr;
  std::unique_ptr<ItemRange[]> ranges_;
  std::exception_ptr error_;  // the first that an item of the job threw; the caller reads it when the gate is empty
  std::atomic<bool> has_failed_{false};
  alignas(kCacheLine) std::atomic<uint32_t> gate_{0};
};

// Never destroyed: at exit the workers sleep, and whichever thread still computes must find its pool.
ThreadPool& pool() {
  static ThreadPool& instance = *new ThreadPool;
  return instance;
}

}  // namespace

void parallel_for(int64_t n, int64_t grain, RangeFunction fn) {
  if (n <= 0) return;
  if (n <= grain) return fn(0, n);
  pool().run(n, grain, fn);
}

void set_num_threads(int32_t num_threads) { pool().set_num_threads(num_threads); }

int32_t num_threads() { return pool().num_threads(); }

}  // namespace pagedcore::cpu
