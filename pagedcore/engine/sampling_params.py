"""How to continue a prompt: the sampling parameters of one request, with vLLM's names and defaults."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pagedcore.engine.parameter_values import as_items, check_logit_bias, check_token_ids, is_integer
from pagedcore.errors import RequestError, shown

GREEDY_TEMPERATURE = 1e-5  # below it, sampling is greedy
MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0  # keeps penalized logits finite
MAX_SEED = 2**64 - 1
MAX_TOKENS = 2**31 - 1
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_SEQUENCES = 64  # of one request
MIN_BEAM_WIDTH = 2
MAX_LENGTH_PENALTY = 5.0
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 1024
MAX_ALLOWED_TOKEN_IDS = 1024
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1
MAX_TENANT_LENGTH = 128

_INTEGER_FIELDS = (
    "n",
    "best_of",
    "beam_width",
    "top_k",
    "seed",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "priority",
)
_FLOAT_FIELDS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "min_p",
    "length_penalty",
)
_BOOL_FIELDS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "use_beam_search",
)
# vLLM's parameters that this version does not have, and the values that ask for nothing.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "logits_processors": (None, []),
    "structured_outputs": (None,),
    "guided_decoding": (None,),
    "logprob_token_ids": (None,),
    "prompt_logprob_token_ids": (None,),
    "prompt_logprob_start": (None,),
    "flat_logprobs": (None, False),
    "output_kind": (None,),
    "stream_interval": (None,),
    "extra_args": (None, {}),
    "skip_reading_prefix_cache": (None, False),
    "thinking_token_budget": (None, -1),
    "repetition_detection": (None,),
    "trace_decode_token_ids": (None,),
}
# Beams are chosen by the model's own log probabilities, before they become text.
_OFF_WITH_BEAM_SEARCH = {
    "stop": (),
    "logprobs": None,
    "prompt_logprobs": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "bad_words": (),
    "logit_bias": None,
    "allowed_token_ids": None,
}
_INTEGER_TEXT = re.compile(r"[+-]?[0-9]{1,20}")
_FLOAT_TEXT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_BOOL_TEXT = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling parameters. One that exists is valid: a bad value raises RequestError.

    Values are normalized: `stop` and `stop_token_ids` become tuples (a single stop string may be given as text), a
    `top_k` of -1 becomes 0 (all), a `seed` of -1 becomes None, and a temperature below 1e-5 becomes 0 (greedy), which
    switches top_k, top_p and min_p off.

    n: output sequences, in [1, 64]
    best_of: sequences that are drawn, at least n; the n of largest cumulative log probability are output, best first, when
        all have ended; None: n. With beam search, vLLM's name for beam_width
    use_beam_search: beam search instead of draws; needs temperature 0. Implied by beam_width
    beam_width: beams, in [2, 64], at least n; after construction None exactly when there is no beam search
    length_penalty: with beam search, a finished beam's score is its log probability / length ** length_penalty
    early_stopping: with beam search, when to end: True: as soon as beam_width beams have ended; False: when the best open
        beam, taken at its present length, is worse than all of those; "never": when no length could make it better
    presence_penalty, frequency_penalty: in [-2, 2]; taken off the logit of a token that has been output: once, or once
        for each time
    repetition_penalty: divides the positive and multiplies the negative logits of tokens in prompt or output
    temperature: 0 is greedy
    top_p, top_k, min_p: keep the most likely tokens of this cumulative probability; this many (0: all); those at least
        this likely, relative to the most likely one. Applied in the order top_k, top_p, min_p
    seed: makes the draws reproducible; None: the engine chooses
    stop, stop_token_ids: texts and token ids that end the output
    ignore_eos: do not end at the end-of-sequence token
    max_tokens: output tokens at most; None: until the context is full
    min_tokens: output tokens at least; until then, end-of-sequence and stop tokens are not drawn
    logprobs: how many of the most likely tokens to report beside each output token; None: no log probabilities
    prompt_logprobs: as logprobs, for every prompt token but the first; the whole prompt is then computed, none of it taken
        from the prefix cache
    detokenize: False gives token ids only, and excludes stop strings
    bad_words: texts that the output does not contain: a token that would complete one is not drawn
    logit_bias: by token id, what is added to its logit, in [-100, 100]; becomes a tuple of pairs
    allowed_token_ids: the only tokens that may be drawn; None: all
    truncate_prompt_tokens: keep this many of the prompt's last tokens; -1: as many as fit; None: all
    spaces_between_special_tokens: either value gives the same text, as the tokenizers in use put no spaces there
    priority: lower is more urgent; decides who is admitted first and who is preempted
    tenant: at most 128 characters; requests of equal priority are admitted so that each tenant gets its share of tokens
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    best_of: int | None = None
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    priority: int = 0
    tenant: str = ""
    bad_words: Sequence[str] | None = ()
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    allowed_token_ids: Sequence[int] | None = None
    truncate_prompt_tokens: int | None = None
    has_token_rules: bool = field(init=False, repr=False, compare=False)
    has_penalties: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in _BOOL_FIELDS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {shown(getattr(self, name))}")
        self._check_integer("n", 1, MAX_SEQUENCES)
        self._check_integer("best_of", 1, MAX_SEQUENCES, optional=True)
        self._check_integer("beam_width", MIN_BEAM_WIDTH, MAX_SEQUENCES, optional=True)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(f'early_stopping must be true, false or "never", got {shown(self.early_stopping)}')
        self._check_float("length_penalty", -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        self._check_float("presence_penalty", -2.0, 2.0)
        self._check_float("frequency_penalty", -2.0, 2.0)
        self._check_float("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        self._check_float("temperature", 0.0, MAX_TEMPERATURE)
        self._check_float("top_p", 0.0, 1.0, above_low=True)
        self._check_float("min_p", 0.0, 1.0)
        self._check_integer("top_k", -1, MAX_TOKENS)
        self._check_integer("seed", -1, MAX_SEED, optional=True)
        self._check_integer("max_tokens", 1, MAX_TOKENS, optional=True)
        self._check_integer("min_tokens", 0, MAX_TOKENS)
        for name in ("logprobs", "prompt_logprobs"):
            self._check_integer(name, 0, MAX_TOKENS, optional=True, high_name="max_logprobs")
        self._check_integer("priority", MIN_PRIORITY, MAX_PRIORITY)
        if not isinstance(self.tenant, str) or len(self.tenant) > MAX_TENANT_LENGTH:
            limit = f"a text of at most {MAX_TENANT_LENGTH} characters"
            raise RequestError(f"tenant must be {limit}, got {shown(self.tenant)}")
        self._check_stop()
        self._check_stop_token_ids()
        self._check_token_rules()
        self._check_truncation()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        self._normalize()
        if self.use_beam_search or self.beam_width is not None:
            self._check_beam_search()
        else:
            self._check_best_of()

    @property
    def logit_biases(self) -> Sequence[tuple[int, float]]:
        """The biases as (token id, bias), by ascending id."""
        assert not isinstance(self.logit_bias, Mapping), "normalized at construction"
        return self.logit_bias or ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def num_sequences(self) -> int:
        """Sequences that the request may have at once: beams, or draws to choose the best of."""
        return self.beam_width or self.best_of or self.n

    @property
    def ranks_outputs(self) -> bool:
        """Whether the outputs are chosen among more when all have ended, and so cannot be streamed."""
        return self.beam_width is not None or self.num_sequences > self.n

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a decoded JSON object. Numbers and booleans may be given as text: "100", "0.5", "true".

        Raises RequestError for an unknown key (naming the nearest known one), a wrong type or a value out of range.
        """
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for key, value in values.items():
            if key in _NEUTRAL_VALUES:
                if value not in _NEUTRAL_VALUES[key]:
                    raise RequestError(
                        f"{key} is not supported in this version and must be left out, got {shown(value)}"
                    )
            elif key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f", did you mean {near[0]!r}?" if near else f"; known ones: {', '.join(known)}"
                raise RequestError(f"unknown sampling parameter {shown(key)}{hint}")
        return cls(**{key: _from_text(key, value) for key, value in values.items() if key not in _NEUTRAL_VALUES})

    def _check_float(self, name: str, low: float, high: float, *, above_low: bool = False) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (above_low and value == low):
            allowed = f"{'(' if above_low else '['}{low:g}, {high:g}]"
            raise RequestError(f"{name} must be a number in {allowed}, got {shown(value)}")
        object.__setattr__(self, name, float(value))

    def _check_integer(
        self, name: str, low: int, high: int, *, optional: bool = False, high_name: str | None = None
    ) -> None:
        """`high_name`: what the engine, which will check it, calls the upper limit."""
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON writers may make 8.0 of 8
        if not is_integer(value, low, high):
            raise RequestError(f"{name} must be an integer in [{low}, {high_name or high}], got {shown(value)}")
        object.__setattr__(self, name, int(value))

    def _check_stop(self) -> None:
        given: Any = self.stop
        strings = (given,) if isinstance(given, str) else as_items("stop", given, "text or a list of texts")
        if len(strings) > MAX_STOP_STRINGS:
            raise RequestError(f"stop must hold at most {MAX_STOP_STRINGS} texts, got {len(strings)}")
        for text in strings:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_STRING_LENGTH:
                limit = f"1 to {MAX_STOP_STRING_LENGTH} characters"
                raise RequestError(f"stop must hold texts of {limit}, got {shown(text)}")
        if strings and not self.detokenize:
            raise RequestError("stop needs detokenize to be true: stop texts are looked for in the output's text")
        object.__setattr__(self, "stop", strings)

    def _check_stop_token_ids(self) -> None:
        object.__setattr__(
            self, "stop_token_ids", check_token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        )

    def _check_token_rules(self) -> None:
        words = as_items("bad_words", self.bad_words, "a list of texts")
        if len(words) > MAX_BAD_WORDS:
            raise RequestError(f"bad_words must hold at most {MAX_BAD_WORDS} texts, got {len(words)}")
        for word in words:
            if not isinstance(word, str) or not word.strip() or len(word) > MAX_BAD_WORD_LENGTH:
                limit = f"at most {MAX_BAD_WORD_LENGTH} characters, not only spaces"
                raise RequestError(f"bad_words must hold texts of {limit}, got {shown(word)}")
        object.__setattr__(self, "bad_words", words)
        object.__setattr__(self, "logit_bias", check_logit_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = check_token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
            if not allowed:
                raise RequestError("allowed_token_ids must hold at least 1 id, got []")
            object.__setattr__(self, "allowed_token_ids", tuple(dict.fromkeys(allowed)))
        has_rules = bool(words or self.logit_bias or self.allowed_token_ids)
        object.__setattr__(self, "has_token_rules", has_rules)

    def _check_truncation(self) -> None:
        self._check_integer("truncate_prompt_tokens", -1, MAX_TOKENS, optional=True)
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens must be -1 or at least 1, got 0")

    def _check_best_of(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of must be at least n ({self.n}), got {self.best_of}")
        if self.ranks_outputs and self.stop:
            raise RequestError(
                "stop must be empty when best_of is above n (outputs are ranked before they become text), "
                f"got {shown(self.stop)}"
            )
        for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(self, name) != default:
                raise RequestError(f"{name} needs use_beam_search or beam_width, got {shown(getattr(self, name))}")

    def _check_beam_search(self) -> None:
        width = self.beam_width if self.beam_width is not None else self.best_of if self.best_of is not None else self.n
        name = "beam_width" if self.beam_width is not None else "best_of" if self.best_of is not None else "n"
        if width < MIN_BEAM_WIDTH:
            raise RequestError(
                f"{name} must be in [{MIN_BEAM_WIDTH}, {MAX_SEQUENCES}] with beam search, got {shown(width)}"
            )
        if self.best_of not in (None, width):
            raise RequestError(f"best_of must be beam_width ({width}) or left out with beam search, got {self.best_of}")
        if self.n > width:
            raise RequestError(f"n must be in [1, {width}] ({name}) with beam search, got {self.n}")
        if self.temperature != 0.0:
            raise RequestError(f"temperature must be 0 with beam search, got {self.temperature:g}")
        for field_name, off in _OFF_WITH_BEAM_SEARCH.items():
            if getattr(self, field_name) != off:
                allowed = "null or left out" if off is None else "empty" if off == () else f"{off:g}"
                raise RequestError(
                    f"{field_name} must be {allowed} with beam search, got {shown(getattr(self, field_name))}"
                )
        for field_name, value in (("use_beam_search", True), ("beam_width", width), ("best_of", width)):
            object.__setattr__(self, field_name, value)

    def _normalize(self) -> None:
        if self.temperature < GREEDY_TEMPERATURE:
            for name, off in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                object.__setattr__(self, name, off)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        object.__setattr__(self, "has_penalties", any(penalty != 0.0 for penalty in penalties))


def _from_text(name: str, value: Any) -> Any:
    """The number or boolean that a text stands for, where the field wants one; else the value itself."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if name in _INTEGER_FIELDS and _INTEGER_TEXT.fullmatch(text):
        return int(text)
    if name in _FLOAT_FIELDS and _FLOAT_TEXT.fullmatch(text):
        return float(text)
    if name in _BOOL_FIELDS or name == "early_stopping":
        return _BOOL_TEXT.get(text.lower(), value)
    return value
