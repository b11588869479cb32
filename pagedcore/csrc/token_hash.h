// A fast 64-bit hash of a block's tokens.
#pragma once

#include <cstdint>
#include <span>

namespace pagedcore {

// Not cryptographic: whoever looks up by it compares the tokens too.
uint64_t hash_tokens(uint64_t seed, std::span<const int32_t> tokens);

}  // namespace pagedcore
