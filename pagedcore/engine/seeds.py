"""Seeds made of seeds."""

from __future__ import annotations

_MASK64 = 2**64 - 1


def mix_seed(seed: int, number: int) -> int:
    """A 63-bit seed for the `number`-th user of a 64-bit `seed`: SplitMix64 (Steele et al. 2014)."""
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (x ^ (x >> 31)) >> 1
