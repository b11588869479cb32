"""What the fuzzer sends: near-valid requests, and text and bytes that are nearly JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from pagedcore.engine.sampling_params import SamplingParams

FIELDS = sorted(field.name for field in dataclasses.fields(SamplingParams) if field.init)
OTHER_KEYS = (
    "cache_salt",
    "lora_name",
    "prompt_logprob_start",
    "extra_args",
    "temprature",
    "",
    "timeout",
    "\u0000",
    "n" * 300,
)
FLAGS = (
    "stream",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_logprobs",
    "return_token_ids",
    "return_prompt_logprobs",
)

# Where limits are, one step beside them, and what the types of JSON and Python make of numbers.
NUMBERS: list[float] = [0, -0.0, 1, -1, 2, 3, 16, 17, 20, 21, 63, 64, 65, 100, 101, 49151, 49152]
NUMBERS += [0.01, 0.5, 1.5, 2.0, -2.0, 2.1, 1e-9, 1e-320, 1e308]
NUMBERS += [2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**63, 10**64]
TEXTS = ["", " ", "x", "1", "-1", " 7 ", "1e5", "1e9999", "nan", "true", "False", "never", "<|im_end|>"]
TEXTS += ["\u0000", "\U0001f600", "\x1b[2J", "\u202e", "\x04", "\u00e9\u0301"]
TEXTS += ["x" * 1024, "x" * 1025, "x" * 128, "x" * 129, "9" * 70]
numbers = st.sampled_from(NUMBERS)
texts = st.sampled_from(TEXTS)
leaves = numbers | texts | st.booleans() | st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6)
keys = texts | st.sampled_from(["0", "7", "07", "49152", "role", "content", "type", "text"])
values = leaves | st.lists(leaves, max_size=4) | st.dictionaries(keys, leaves, max_size=4)
long_lists = st.builds(lambda value, count: [value] * count, leaves, st.sampled_from([64, 65, 128, 129, 1024, 1025]))
parameter_names = st.sampled_from(FIELDS) | st.sampled_from(OTHER_KEYS)
parameter_objects = st.dictionaries(parameter_names, values | long_lists, max_size=4)

_parts = st.fixed_dictionaries({}, optional={"type": st.just("text") | leaves, "text": texts | leaves})
_contents = texts | st.lists(_parts | leaves, max_size=3) | leaves
_role_names = st.sampled_from(["system", "user", "assistant", "tool", "developer"])
_roles = _role_names | leaves
_sound_messages = st.lists(
    st.fixed_dictionaries({"role": _role_names, "content": texts | st.text(max_size=6)}), min_size=1, max_size=4
)
messages = _sound_messages | st.lists(
    st.fixed_dictionaries({}, optional={"role": _roles, "content": _contents, "tool_calls": values, "name": leaves})
    | values,
    max_size=4,
)

_PUNCTUATION = st.text('{}[]":,\\0123456789.eE+-/ \n\tunltrefasN\ud800', max_size=12).map(
    lambda text: text.encode(errors="surrogatepass").decode(errors="replace")
)


@dataclass(frozen=True)
class Cut:
    """A change of a text: `count` characters from `position` (in [0, 1]) on become `text`."""

    position: float
    count: int
    text: str

    def apply(self, text: str) -> str:
        start = round(self.position * len(text))
        return text[:start] + self.text + text[start + self.count :]


_cuts = st.builds(Cut, st.floats(0, 1), st.integers(0, 3), _PUNCTUATION)


def mostly(usual: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nine times of ten the usual."""
    return st.integers(0, 9).flatmap(lambda number: other if number == 9 else usual)


def encoded(objects: st.SearchStrategy[Any]) -> st.SearchStrategy[str]:
    """JSON of these objects, mostly as it should be, else with a few changes; or anything."""
    sound = st.builds(lambda value, escapes: json.dumps(value, ensure_ascii=escapes), objects, st.booleans())
    damaged = st.builds(_change, sound, st.lists(_cuts, min_size=1, max_size=3))
    nested = st.builds(
        lambda text, count: text * count, st.sampled_from(["[", '{"a":', "[]", "9"]), st.integers(0, 200)
    )
    kinds = [sound] * 7 + [damaged] * 3 + [nested, _PUNCTUATION | st.text(max_size=20)]
    return st.integers(0, len(kinds) - 1).flatmap(kinds.__getitem__)


def _change(text: str, cuts: list[Cut]) -> str:
    for cut in cuts:
        text = cut.apply(text)
    return text
