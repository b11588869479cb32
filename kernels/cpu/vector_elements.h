// The two 16-bit element types, which C++20 does not have, and their conversion to and from float.
//
// Everything in the vector_*.h headers has internal linkage: they are compiled once per instruction set, and the linker
// must not take one set's copy for another's.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace pagedcore::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

[[maybe_unused]] inline float to_float(float value) { return value; }

[[maybe_unused]] inline float to_float(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

[[maybe_unused]] inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shifted into a float's exponent field the value is too small by 2^112; the product restores it, subnormals
  // included.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

[[maybe_unused]] inline void from_float(float value, float* out) { *out = value; }

// To nearest, ties to even. A NaN stays one: it comes from 16-bit inputs or from the processor, and its low half, which
// rounding could carry into the sign, is zero.
[[maybe_unused]] inline void from_float(float value, BFloat16* out) {
  const auto bits = std::bit_cast<uint32_t>(value);
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

[[maybe_unused]] inline void from_float(float value, Float16* out) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520: rounds to infinity
    out->bits = sign | 0x7c00u;
  } else if (magnitude <
             0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, in the low part of the sum
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    out->bits = static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000u));
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
    out->bits = static_cast<uint16_t>(sign | (rounded >> 13));
  }
}

}  // namespace
}  // namespace pagedcore::cpu
