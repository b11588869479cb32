// What this machine can do at most, for cpu_linear.py: bytes read from memory and bfloat16 dot products, each in a
// second, on N threads. Usage: cpu_ceiling N. Prints the two rates, best of several rounds.
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12, of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kRounds = 15;
constexpr size_t kBytesPerThread = size_t{128} << 20;  // far beyond the last-level cache
constexpr int64_t kDotIterations = 400'000;
constexpr int kSums = 16;  // independent: more than latency times throughput

volatile float sink;

void read_memory(const char* p) {
  __m512 sums[4] = {};
  for (size_t i = 0; i < kBytesPerThread; i += 256) {
    for (int j = 0; j < 4; ++j) {
      __builtin_prefetch(p + i + 4096 + 64 * j);
      sums[j] = _mm512_add_ps(sums[j], _mm512_load_ps(p + i + 64 * j));
    }
  }
  sink = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

void multiply() {
  __m512 sums[kSums];
  for (int i = 0; i < kSums; ++i)
    sums[i] = _mm512_set1_ps(static_cast<float>(i));  // different, or they are computed once
  auto x = _mm512_set1_epi32(0x3f803f80);
  for (int64_t i = 0; i < kDotIterations; ++i) {
    asm volatile("" : "+v"(x));  // not a constant: the products are not to be computed beforehand
#pragma GCC unroll 16
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x);
  }
  for (auto& sum : sums) sink = _mm512_reduce_add_ps(sum);
}

// Seconds of the best round of work(thread) on all threads at once.
template <class Work>
double best_seconds(int num_threads, const Work& work) {
  std::barrier barrier(num_threads);
  std::vector<double> seconds(kRounds);
  const auto body = [&](int thread) {
    for (double& round : seconds) {
      barrier.arrive_and_wait();
      const auto start = std::chrono::steady_clock::now();
      work(thread);
      barrier.arrive_and_wait();
      if (thread == 0) round = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(body, i);
  body(0);
  for (std::thread& thread : threads) thread.join();
  return *std::min_element(seconds.begin(), seconds.end());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const int num_threads = std::atoi(argv[1]);
  const size_t bytes = num_threads * kBytesPerThread;
  void* const mapping =
      mmap(nullptr, bytes + 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (mapping == MAP_FAILED) return 1;
  char* const data = static_cast<char*>(mapping);
  std::memset(data, 0, bytes);
  const double read = best_seconds(num_threads, [&](int thread) { read_memory(data + thread * kBytesPerThread); });
  const double dot = best_seconds(num_threads, [](int) { multiply(); });
  const double operations = 64.0 * kSums * kDotIterations * num_threads;  // 32 multiplications and additions each
  std::printf("%.4g %.4g\n", bytes / read, operations / dot);
}
