// Which of the compiled instruction-set variants the kernels run: decided once, from what the processor and its system
// offer.
#pragma once

#include <cstdint>

namespace pagedcore::cpu {

// Ordered: each one includes those before it.
enum class Isa : int32_t { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

// The best variant of this processor, unless a test has chosen a lower one.
Isa isa();

// Make isa() return the variant of this name ("generic", "avx2", "avx512", "avx512_bf16"), so that a test runs every
// path the machine has. Throws std::invalid_argument for an unknown name or a variant that the processor lacks. Not
// while a kernel runs.
void set_isa_for_testing(const char* name);

}  // namespace pagedcore::cpu
