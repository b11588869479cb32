// A program for test_thread_pool.py: every item of every job is done exactly once, whatever the sizes, threads and
// callers.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"
#include "ops.h"

using pagedcore::cpu::parallel_for;

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::exit(1);
}

void one_job(int64_t n, int64_t grain) {
  std::vector<std::atomic<int>> times(n);
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    check(0 <= begin && begin < end && end <= n, "a piece lies in [0, n) and is not empty");
    for (int64_t i = begin; i < end; ++i) ++times[i];
  });
  for (const auto& count : times) check(count == 1, "an item is done exactly once, before parallel_for returns");
}

void many_jobs(int num_jobs, unsigned seed) {
  std::mt19937 random(seed);
  for (int i = 0; i < num_jobs; ++i) {
    one_job(random() % 200, random() % 6);
    // Now and then longer than the threads spin, so that they are woken up.
    if (i % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// A body may run out of memory on any thread: the caller hears of it, and the other items are done all the same.
void job_that_throws(int64_t n, int64_t bad) {
  std::vector<std::atomic<int>> times(n);
  bool caught = false;
  try {
    parallel_for(n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        ++times[i];
        if (i == bad) throw std::bad_alloc();
      }
    });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  check(caught, "what a body throws reaches the caller");
  int64_t done = 0;
  for (const auto& count : times) {
    check(count <= 1, "no item is done twice after one has thrown");
    done += count;
  }
  check(done > 0 && times[bad] == 1, "the item that threw was begun");
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 3, 8}) {
    pagedcore::cpu::set_num_threads(threads);
    check(pagedcore::cpu::num_threads() == threads, "num_threads is what was set");
    many_jobs(4000, threads);
    for (int64_t bad = 0; bad < 64; ++bad) job_that_throws(64, bad);
    one_job(1000, 1);
  }
  std::vector<std::thread> callers;
  for (unsigned seed = 0; seed < 3; ++seed) callers.emplace_back(many_jobs, 200000, seed);
  for (std::thread& caller : callers) caller.join();
  std::puts("passed");
  std::fflush(stdout);
  // The process ends in the middle of a job.
  std::thread([] {
    while (true) parallel_for(1000, 1, [](int64_t, int64_t) {});
  }).detach();
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
}
