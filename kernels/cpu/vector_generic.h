// Four floats at a time in plain C++: the compiler's vector extension makes of it what the processor has.
#pragma once

#include <cstring>

#include "cpu/vector_elements.h"

namespace pagedcore::cpu {
namespace {

struct VectorGeneric {
  static constexpr int kWidth = 4;
  static constexpr int kMaxRows = 2;  // of a register tile
  typedef float Reg __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));

  static Reg set1(float value) { return Reg{} + value; }

  static Reg load(const float* p) {
    Reg reg;
    std::memcpy(&reg, p, sizeof(reg));
    return reg;
  }
  template <class T>
  static Reg load(const T* p) {
    Reg reg;
    for (int i = 0; i < kWidth; ++i) reg[i] = to_float(p[i]);
    return reg;
  }
  template <class T>
  static Reg load_first(const T* p, int count) {
    Reg reg{};
    for (int i = 0; i < count; ++i) reg[i] = to_float(p[i]);
    return reg;
  }
  static void store(float* p, Reg reg) { std::memcpy(p, &reg, sizeof(reg)); }
  template <class T>
  static void store(T* p, Reg reg) {
    store_first(p, kWidth, reg);
  }
  template <class T>
  static void store_first(T* p, int count, Reg reg) {
    for (int i = 0; i < count; ++i) from_float(reg[i], p + i);
  }

  // Lane i of the low (high) result is the first (second) element of pair i.
  static void load_pairs(const BFloat16* p, Reg* low, Reg* high) {
    Int bits;
    std::memcpy(&bits, p, sizeof(bits));
    *low = std::bit_cast<Reg>(bits << 16);
    *high = std::bit_cast<Reg>(bits & static_cast<int32_t>(0xffff0000));
  }

  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg clamp(Reg x, float low, float high) {
    x = x < low ? set1(low) : x;
    return x > high ? set1(high) : x;
  }
  static Reg round(Reg x) {
    const Reg magic = set1(0x1.8p23f);  // the sum has no bits left for a fraction
    return (x + magic) - magic;
  }
  // x * 2^n for integral n in [-126, 127].
  static Reg scale(Reg x, Reg n) {
    const Int exponent = __builtin_convertvector(n, Int) + 127;
    return x * std::bit_cast<Reg>(exponent << 23);
  }
  static float sum(Reg x) { return (x[0] + x[2]) + (x[1] + x[3]); }
};

}  // namespace
}  // namespace pagedcore::cpu
