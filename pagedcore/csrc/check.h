// Checks that stay in release builds.
#pragma once

#include <stdexcept>
#include <string>

namespace pagedcore {

// An internal invariant; a failure is a bug in this module. Throws std::runtime_error.
inline void check(bool condition, const char* invariant) {
  if (!condition) [[unlikely]]
    throw std::runtime_error(std::string("block manager: ") + invariant);
}

// A caller named a sequence that the block manager does not have (a KeyError in Python).
struct UnknownSequence : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace pagedcore
