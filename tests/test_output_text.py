"""The way from prompt to output: what a long or senseless prompt costs."""

from __future__ import annotations

import tracemalloc

import pytest

from pagedcore.output_text import IncrementalDetokenizer, prompt_end
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.text import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ensure_default_model())


def test_ids_without_a_token_are_not_remembered(tokenizer: Tokenizer) -> None:
    """A client could send others each time."""
    tracemalloc.start()
    try:
        for token_id in range(tokenizer.vocab_size, tokenizer.vocab_size + 100_000):
            assert tokenizer.token_bytes(token_id) == b""
        assert tracemalloc.get_traced_memory()[0] < 1 << 16
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [1, 100])
def test_a_character_goes_on_behind_special_tokens(tokenizer: Tokenizer, count: int) -> None:
    begin, end = _unfinished(tokenizer)
    between = tokenizer.encode("<|im_end|>") * count
    assert IncrementalDetokenizer(tokenizer, prompt_end(tokenizer, begin + between)).push(end) == "é"


@pytest.mark.parametrize("last", ["<|im_end|>", None], ids=["special tokens", "ids without a token"])
def test_an_unfinished_character_is_looked_for_near_the_prompts_end_only(
    tokenizer: Tokenizer, last: str | None
) -> None:
    """However many tokens without text come behind it."""
    begin, _ = _unfinished(tokenizer)
    behind = [tokenizer.vocab_size] if last is None else tokenizer.encode(last)
    assert prompt_end(tokenizer, begin + behind).tail == b"\xc3"
    assert prompt_end(tokenizer, begin + behind * 10_000).tail == b""


def _unfinished(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of the two bytes of é."""
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    return [by_bytes[b"\xc3"]], [by_bytes[b"\xa9"]]
