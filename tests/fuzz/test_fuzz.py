"""A short run of the fuzzer; `make fuzz` is the long one."""

from __future__ import annotations

import pytest

from pagedcore.serve.default_model import ensure_default_model
from pagedcore.text import Tokenizer, load_tokenizer
from tests.fuzz import reference
from tests.fuzz.parser import check_field, check_refusal, fuzz


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ensure_default_model())


def test_the_parser_takes_or_refuses_whatever_comes(tokenizer: Tokenizer) -> None:
    tally = fuzz(tokenizer, num_cases=2400, seed=1)
    assert tally.num_taken > 150
    assert len(tally.refusals) > 40


@pytest.mark.parametrize("text", ["", "x" * 1001, "two\nlines", "\x1b[2J", "caf\u00e9"])
def test_a_refusal_that_cannot_be_printed_anywhere_is_found(text: str) -> None:
    with pytest.raises(AssertionError):
        check_refusal(text)


def test_a_value_that_only_the_parser_takes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "allows", lambda name, value: False)
    with pytest.raises(AssertionError, match="n = 1 is taken"):
        check_field("n", 1)
