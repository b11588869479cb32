"""Which tokens a request may draw: its rules against the vocabulary, and the bad words that its output could complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.step_plan import Int32Array
from pagedcore.errors import RequestError

ALWAYS = -1

BadWords = tuple[tuple[int, ...], ...]  # token ids of each


def check_token_rules(
    params: SamplingParams, bad_words: BadWords, stop_token_ids: frozenset[int], vocab_size: int
) -> None:
    """Raise RequestError for ids outside the vocabulary, and for rules that could leave no token to draw.

    `bad_words`: the reachable ones.
    """
    for name, token_ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", [token_id for token_id, _ in params.logit_biases]),
        ("allowed_token_ids", params.allowed_token_ids or ()),
    ):
        wrong = [token_id for token_id in token_ids if token_id >= vocab_size]
        if wrong:
            raise RequestError(f"{name} must be in [0, {vocab_size - 1}], got {wrong[0]}")
    if params.allowed_token_ids is None:
        return
    left = set(params.allowed_token_ids) - {word[-1] for word in bad_words}
    if params.min_tokens > 0:
        left -= stop_token_ids
    if not left:
        raise RequestError(
            "allowed_token_ids must hold a token that does not end a bad word"
            f"{' and, with min_tokens, does not end the output' if params.min_tokens > 0 else ''}, "
            f"got {len(params.allowed_token_ids)} that do"
        )


def reachable_words(bad_words: BadWords, vocab_size: int) -> BadWords:
    """Those that draws could make up: of at least one token, all of them in the vocabulary.

    A tokenizer may drop all of a word, and may have added tokens that the model has no logits for.
    """
    return tuple(word for word in bad_words if word and max(word) < vocab_size)


@dataclass(frozen=True)
class BadWordBans:
    """Which tokens would complete a bad word behind which output tokens; made once, as a step has no time to look at all words.

    by_ending: for output that ends with these tokens, [k, 3] int32, (0, token id, the token it must follow or ALWAYS).
    lengths: of the keys that end with a token, by that token; of the one for any output, (), by None.
    """

    by_ending: dict[tuple[int, ...], Int32Array]
    lengths: dict[int | None, tuple[int, ...]]

    @classmethod
    def of(cls, words: BadWords, num_in_flight: int) -> BadWordBans:
        """Of words of at least one token each.

        With a token in flight (0 or 1), which the host does not know, the rest of a bad word can only be compared up to it:
        the executor then compares the last one.
        """
        bans: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        lengths: dict[int | None, dict[int, None]] = {}
        for *rest, last in words:
            follows = rest.pop() if num_in_flight and rest else ALWAYS
            bans.setdefault(tuple(rest), []).append((0, last, follows))
            lengths.setdefault(rest[-1] if rest else None, {})[len(rest)] = None
        return cls(
            {ending: np.array(table, np.int32) for ending, table in bans.items()},
            {token_id: tuple(of_token) for token_id, of_token in lengths.items()},
        )

    def tables(self, sequence: Sequence) -> Iterator[Int32Array]:
        """The bans for the next token of a sequence, as in `by_ending`."""
        tokens = sequence.token_ids
        for length in (*self.lengths.get(None, ()), *self.lengths.get(tokens[-1], ())):
            if length <= sequence.num_output_tokens:
                table = self.by_ending.get(tuple(tokens[len(tokens) - length :]))
                if table is not None:
                    yield table
