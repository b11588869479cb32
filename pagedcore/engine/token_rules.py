"""Which tokens a request may draw: its rules against the vocabulary, and the bad words that its output could complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import Sequence
from pagedcore.errors import RequestError

ALWAYS = -1

BadWords = tuple[tuple[int, ...], ...]  # token ids of each


def check_token_rules(
    params: SamplingParams, bad_words: BadWords, stop_token_ids: frozenset[int], vocab_size: int
) -> None:
    """Raise RequestError for ids outside the vocabulary, and for rules that could leave no token to draw."""
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


def bad_word_bans(
    bad_words: Iterable[tuple[int, ...]], sequence: Sequence, num_in_flight: int
) -> Iterator[tuple[int, int]]:
    """The tokens that would complete a bad word next, as (token id, the token it must follow or ALWAYS).

    With a token in flight (0 or 1), which the host does not know, the rest of a bad word can only be compared up to it:
    the executor then compares the last one.
    """
    tokens = sequence.token_ids
    for word in bad_words:
        num_known = len(word) - 1 - num_in_flight
        if len(word) == 1:
            yield word[0], ALWAYS
        elif num_known <= sequence.num_output_tokens and word[:num_known] == tuple(tokens[len(tokens) - num_known :]):
            yield word[-1], word[-2] if num_in_flight else ALWAYS
