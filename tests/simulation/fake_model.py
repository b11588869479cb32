"""A "model" whose K/V are hashes of everything before them, so that any error in a block table, slot or copy changes a token.

What it writes into a slot depends on the slot before it, as it reads that through the block table, on the token and on its
position. What it draws depends on every slot of the context, read through the block table. Hashes are those of Python's
integers and tuples, which are not randomized, and are as fast as anything that is called from Python.
"""

from __future__ import annotations

from collections.abc import Sequence

VOCAB_SIZE = 31
EOS = 0
ROOT = 0x5851F42D4C957F2D  # what lies before the first slot
POISON = -2  # in a slot that nobody has written since its block was taken; no hash is -2 but by accident
_SPREAD = 0x9E3779B97F4A7C15


def entry(before: int, token_id: int, position: int) -> int:
    """The K/V of a token behind the K/V `before`."""
    return hash((before, token_id, position))


def context_of(entries: Sequence[int]) -> int:
    """Everything in the context, as one number: the "hidden state" behind the last token."""
    return hash(tuple(entries))


def draw(context: int, seed: int | None, draw_index: int) -> int:
    """The next token; `seed` is None in a greedy row."""
    return (context if seed is None else hash((context, seed, draw_index))) % VOCAB_SIZE


def logprobs(context: int) -> list[float]:
    """[VOCAB_SIZE], in no relation to `draw`; multiples of 1/256, so that sums are exact in float32 too."""
    return [-((context ^ (token_id * _SPREAD)) % 10_007) / 256 for token_id in range(VOCAB_SIZE)]


def most_likely(values: list[float], count: int) -> list[int]:
    """The `count` most likely tokens, most likely first; of equal ones the smaller id first."""
    return sorted(range(VOCAB_SIZE), key=lambda token_id: (-values[token_id], token_id))[:count]


def context_after(token_ids: Sequence[int]) -> int:
    """The context of plain tokens, without blocks or batches."""
    entries: list[int] = []
    before = ROOT
    for position, token_id in enumerate(token_ids):
        before = entry(before, token_id, position)
        entries.append(before)
    return context_of(entries)
