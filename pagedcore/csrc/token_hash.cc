#include "token_hash.h"

#include <bit>

namespace pagedcore {
namespace {

constexpr uint64_t kMultiplier = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio, odd

// Two multiplications and three shifts spread every input bit over all output bits (constants of SplitMix64, Steele et
// al. 2014).
uint64_t avalanche(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9;
  x ^= x >> 27;
  x *= 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

uint64_t hash_tokens(uint64_t seed, std::span<const int32_t> tokens) {
  uint64_t hash = avalanche(seed + kMultiplier * (tokens.size() + 1));
  // Two tokens a round: one multiplication carries low bits up, the rotation brings high bits down again.
  size_t i = 0;
  for (; i + 2 <= tokens.size(); i += 2) {
    const uint64_t word = static_cast<uint32_t>(tokens[i]) | static_cast<uint64_t>(static_cast<uint32_t>(tokens[i + 1]))
                                                                 << 32;
    hash = std::rotl((hash ^ word) * kMultiplier, 29);
  }
  if (i < tokens.size()) hash = std::rotl((hash ^ static_cast<uint32_t>(tokens[i])) * kMultiplier, 29);
  return avalanche(hash);
}

}  // namespace pagedcore
