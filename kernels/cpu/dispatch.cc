#include "cpu/dispatch.h"

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace pagedcore::cpu {
namespace {

constexpr std::array<const char*, 4> kNames = {"generic", "avx2", "avx512", "avx512_bf16"};

Isa detect() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();  // __builtin_cpu_supports also asks whether the operating system saves the wide registers
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kGeneric;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kGeneric;
#endif
}

Isa best() {
  static const Isa detected = detect();
  return detected;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{best()};
  return value;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa_for_testing(const char* name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] != std::string(name)) continue;
    if (static_cast<Isa>(i) > best()) throw std::invalid_argument("this processor has no " + std::string(name));
    chosen().store(static_cast<Isa>(i));
    return;
  }
  throw std::invalid_argument("unknown instruction set " + std::string(name));
}

const char* instruction_set() { return kNames[static_cast<size_t>(isa())]; }

}  // namespace pagedcore::cpu
