"""Random requests through everything that runs before the engine: each is taken as it was meant, or refused with one clear text."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from pagedcore_triton.protocol import OUTPUTS
from pagedcore_triton.requests import GenerateRequest, encode_prompt, parse_request, parse_timeout

from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.errors import RequestError
from pagedcore.text import Tokenizer
from tests.fuzz import reference
from tests.fuzz.strategies import FIELDS, FLAGS, encoded, leaves, long_lists, messages, parameter_objects, texts, values

_Test = TypeVar("_Test", bound=Callable[..., None])
MAX_ERROR_LENGTH = 1000
MAX_PROMPT_TOKENS = 1023
OUTPUT_NAMES = [output.name for output in OUTPUTS]


@dataclass(frozen=True)
class ParserCase:
    """What Triton gives the model for one request: input tensors as lists, its parameters and its id."""

    inputs: dict[str, Any]
    parameters: str
    request_id: str


@dataclass
class ParserTally:
    """How many cases were taken, how many refused, and by the beginning of which text."""

    num_taken: int = 0
    refusals: Counter[str] = field(default_factory=Counter)

    @property
    def num_cases(self) -> int:
        return self.num_taken + self.refusals.total()


_byte_texts = st.one_of(texts.map(str.encode), st.binary(max_size=8), st.text(max_size=8).map(str.encode))
_strings = {
    "text_input": _byte_texts,
    "messages": encoded(messages).map(str.encode),
    "sampling_parameters": st.one_of(encoded(parameter_objects).map(str.encode), st.binary(max_size=8)),
}
_id_lists = st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 49152), max_size=5)
_bool_inputs = st.dictionaries(st.sampled_from(FLAGS), st.lists(st.booleans(), min_size=1, max_size=2), max_size=2)
_flag_inputs = st.dictionaries(st.sampled_from(FLAGS), st.booleans().map(lambda flag: [flag]), max_size=2)


def _texts_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    one = _strings[name].map(lambda data: {name: [data]})
    return st.one_of(one, one, one, st.lists(_strings[name], max_size=2).map(lambda several: {name: several}))


_prompts = st.one_of(
    st.just({"text_input": [b"Hi"]}),
    _texts_of("text_input"),
    _texts_of("messages"),
    _id_lists.map(lambda ids: {"input_ids": ids}),
    st.just({}),
    st.just({"text_input": [b"Hi"], "messages": [b"[]"]}),
)
_more = st.sampled_from([{}] * 8 + [{"image": [b"x"]}, {"embedding_request": [b"{}"]}])
cases = st.builds(
    lambda prompt, sampling, flags, more, parameters, request_id: ParserCase(
        prompt | sampling | flags | more, parameters, request_id
    ),
    _prompts,
    st.one_of(st.just({}), _texts_of("sampling_parameters")),
    st.one_of(_flag_inputs, _bool_inputs),
    _more,
    encoded(parameter_objects),
    texts,
)
single_fields = st.tuples(st.sampled_from(FIELDS), values | leaves | long_lists)


def fuzz(tokenizer: Tokenizer, num_cases: int, seed: int) -> ParserTally:
    """Cases that depend on the seed only: two thirds are requests, the rest single fields compared with the reference.

    Raises what the first faulty case raises, made small, with the case.
    """
    tally = ParserTally()

    @configured(num_cases - num_cases // 3, seed)
    @hypothesis.given(cases)
    def requests(case: ParserCase) -> None:
        refusal = check_case(tokenizer, case)
        if refusal is None:
            tally.num_taken += 1
        else:
            tally.refusals[refusal[:24]] += 1

    @configured(num_cases // 3, seed)
    @hypothesis.given(single_fields)
    def fields(case: tuple[str, Any]) -> None:
        if check_field(*case):
            tally.num_taken += 1
        else:
            tally.refusals[case[0]] += 1

    requests()
    fields()
    return tally


def configured(num_cases: int, seed: int) -> Callable[[_Test], _Test]:
    """Of a Hypothesis test: so many examples, the same for the same seed, and nothing kept on disk."""
    settings = hypothesis.settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: hypothesis.seed(seed)(settings(test))


def check_case(tokenizer: Tokenizer, case: ParserCase) -> str | None:
    """The refusal's text, or None for a request that is taken. Raises AssertionError for what must not be."""
    inputs = {name: _array(name, value) for name, value in case.inputs.items()}
    try:
        request = parse_request(inputs, case.parameters, OUTPUT_NAMES, model_name="llm", request_id=case.request_id)
        parse_timeout(case.parameters)
        token_ids = encode_prompt(tokenizer, request.prompt, MAX_PROMPT_TOKENS)
        bad_words = tokenizer.bad_word_ids(request.sampling_params.bad_words or ())
    except RequestError as error:
        check_refusal(str(error))
        return str(error)
    assert all(isinstance(token_id, int) and token_id >= 0 for ids in (token_ids, *bad_words) for token_id in ids)
    _check_taken(request)
    return None


def check_refusal(text: str) -> None:
    """One line that can be printed anywhere."""
    assert text
    assert len(text) <= MAX_ERROR_LENGTH, f"{len(text)} characters"
    assert text.isascii() and text.isprintable(), text


def check_field(name: str, value: Any) -> bool:
    """Whether this value is taken; raises AssertionError where the reference says otherwise."""
    decoded = json.loads(json.dumps({name: value}))
    try:
        params = SamplingParams.from_dict(decoded)
    except RequestError as error:
        check_refusal(str(error))
        assert name in str(error) or name in reference.BEAMS, f"{error} does not name {name}"
        taken = False
    else:
        _check_normalized(params)
        taken = True
    expected = reference.allows(name, decoded[name])
    assert expected is None or expected is taken, f"{name} = {value!r} is {'taken' if taken else 'refused'}"
    return taken


def _check_taken(request: GenerateRequest) -> None:
    assert request.prompt or not isinstance(request.prompt, str)
    assert not (request.stream and request.echo)
    _check_normalized(request.sampling_params)


def _check_normalized(params: SamplingParams) -> None:
    """What one is made of makes the same one again."""
    again = {field.name: getattr(params, field.name) for field in dataclasses.fields(params) if field.init}
    assert SamplingParams(**again) == params
    hash(params)


def _array(name: str, value: list[Any]) -> Any:
    if name == "input_ids":
        return np.array(value, np.int32)
    return np.array(value, np.bool_ if name in FLAGS else np.object_)
