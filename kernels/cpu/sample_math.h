// Random numbers, exponential and logarithm for sampling, of which every processor computes the same bits.
//
// Plain additions and multiplications in fixed order, without fused multiply-add (the files that include this are
// compiled with -ffp-contract=off), so that a draw does not depend on the instruction set. Everything is in an
// anonymous namespace: each file has its own copy for its own instruction set.
#pragma once

#include <bit>
#include <cstdint>

namespace pagedcore::cpu {
namespace {

struct PhiloxCounter {
  uint32_t x0, x1, x2, x3;
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3).
inline PhiloxCounter philox(PhiloxCounter counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.x0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.x2;
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter.x1 ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter.x3 ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// exp(x) for x in [-87, 0]; relative error below 1.5e-7, exact at 0.
inline float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is left in the low bits
  const float rounded = x * 1.44269504f + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 0.0013836737f;
  p = p * r + 0.0083748987f;
  p = p * r + 0.0416682325f;
  p = p * r + 0.1666641980f;
  p = p * r + 0.4999999106f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(rounded) - std::bit_cast<int32_t>(kRound);
  return p * std::bit_cast<float>((exponent + 127) << 23);
}

// log(x) for normal positive x; relative error below 3e-7, also next to 1.
inline float log_positive(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // x = 2^exponent * (1 + f), 1 + f in [sqrt(1/2), sqrt(2))
  const float f = std::bit_cast<float>(bits - (exponent << 23)) - 1.0f;
  const float n = static_cast<float>(exponent);
  float p = 0.0873475075f;
  p = p * f - 0.1430748254f;
  p = p * f + 0.1491798908f;
  p = p * f - 0.1657051444f;
  p = p * f + 0.1996207088f;
  p = p * f - 0.2500175536f;
  p = p * f + 0.3333395123f;
  p = p * f - 0.4999999106f;
  return (f * f * p + n * -2.12194440e-4f) + f + n * 0.693359375f;
}

// The largest value `gumbel` takes.
constexpr float kMaxGumbel = 22.19f;

// Standard Gumbel variable of 32 random bits: -log(-log(1 - u)), u = (bits / 2 + 1/2) / 2^31.
// 1 - u rather than u: large values, which decide the draw, then come from small u, where floats are dense.
inline float gumbel(uint32_t bits) {
  constexpr float kScale =
      0x1.FFFFFEp-32f;  // 2^-31 less one unit in the last place: u stays below 1 without a comparison
  const float u = static_cast<float>(static_cast<int32_t>(bits >> 1)) * kScale + 0x1p-32f;
  const float complement = 1.0f - u;
  const float lost = (1.0f - complement) - u;  // what rounding took from the complement, exactly
  return -log_positive(-log_positive(complement) - lost);
}

}  // namespace
}  // namespace pagedcore::cpu
