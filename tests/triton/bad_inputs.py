"""Requests that must be refused, and what the refusal has to say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

HELLO = "Hello"
MAX_INTEGER = 2**31 - 1


@dataclass(frozen=True)
class BadInput:
    """Inputs by name, and parts of the error: the field, what is allowed, and what was given (shortened, where it is long)."""

    inputs: dict[str, Any]
    field: str
    allowed: str
    given: str


def prompt(text: str, allowed: str, given: str, *, field: str = "text_input", **inputs: Any) -> BadInput:
    return BadInput({"text_input": text, **inputs}, field, allowed, given)


def chat(messages: str, allowed: str, given: str, *, field: str = "messages") -> BadInput:
    return BadInput({"messages": messages}, field, allowed, given)


def token_ids(ids: list[int], allowed: str, given: str, *, field: str = "input_ids") -> BadInput:
    return BadInput({"input_ids": ids}, field, allowed, given)


def raw(content: str, allowed: str, given: str, *, field: str = "sampling_parameters") -> BadInput:
    return BadInput({"text_input": HELLO, "sampling_parameters": content}, field, allowed, given)


def sampling(allowed: str, given: str | None = None, *, field: str | None = None, **values: Any) -> BadInput:
    """`field`: the first of the values by default; `given`: that value."""
    name, value = next(iter(values.items()))
    content = json.dumps(values)
    return raw(content, allowed, f"got {value!r}" if given is None else given, field=field or name)


def message(**values: Any) -> str:
    return json.dumps([{"role": "user", "content": "Hi"}, values])


BAD_INPUTS = {
    # The prompt.
    "no prompt": BadInput({"sampling_parameters": "{}"}, "text_input", "is required", "at least 1 character"),
    "empty text": prompt("", "at least 1 character", "got an empty text"),
    "text one token too long": prompt(" a" * 1024, "at most 1023", "1024 tokens", field="the prompt"),
    "text much too long": prompt(" a" * 100_000, "at most 1023", "at least 2", field="the prompt"),
    "text of 2 MiB": prompt("a" * (2 << 20), "at most 1048576 bytes", "got 2097152"),
    "two prompts": prompt(HELLO, "one of text_input, messages, input_ids", "text_input and input_ids", input_ids=[1]),
    "three prompts": prompt(HELLO, "one of", "text_input and messages and input_ids", messages="[]", input_ids=[1]),
    "id negative": token_ids([1, -1], "integers from 0 up", "got -1"),
    "id of the vocabulary's size": token_ids([49152], "[0, 49151]", "got 49152", field="prompt_token_ids"),
    "id of 31 bits": token_ids([MAX_INTEGER], "[0, 49151]", "got 2147483647", field="prompt_token_ids"),
    "ids one too many": token_ids([1] * 1024, "at most 1023", "1024 tokens", field="the prompt"),
    "ids much too many": token_ids([1] * 300_000, "at most 1023", "300000 tokens", field="the prompt"),
    "ids without a token, as many as can be": token_ids(
        list(range(1 << 24, (1 << 24) + (1 << 20))), "at most 1023", "1048576 tokens", field="the prompt"
    ),
    "image": prompt(HELLO, "left out", "takes text only", field="image", image=["aGk="]),
    "embedding": BadInput({"embedding_request": "{}"}, "'embed' request", "left out", "Model llm"),
    "stream with the prompt": prompt(
        HELLO, "not allowed", "= False", field="exclude_input_in_output", stream=True, exclude_input_in_output=False
    ),
    # Messages.
    "messages empty text": chat("", "a JSON list", "at character 0"),
    "messages empty": chat("[]", "at least 1 message", "got none"),
    "messages an object": chat('{"role": "user"}', "a JSON list", "got dict"),
    "messages a number": chat("7", "a JSON list", "got int"),
    "messages unfinished": chat('[{"role": "user"', "a JSON list", "at character 16"),
    "messages followed by more": chat('[{"role": "user"}] []', "a JSON list", "Extra data at character 19"),
    "messages too many": chat(f"[{','.join(['{}'] * 5000)}]", "at most 4096 messages", "got 5000"),
    "messages too deep": chat("[" * 100_000, "at most 32 levels", "got 100000"),
    "messages of 2 MiB": chat(" " * (2 << 20), "at most 1048576 bytes", "got 2097152"),
    "messages with a key twice": chat('[{"role": "a", "role": "b"}]', "not repeat a key", "got 'role' 2 times"),
    "messages with a number too large": chat('[{"role": -1e999}]', "finite numbers only", "got -1e999"),
    "messages with NaN": chat('[{"role": NaN}]', "finite numbers only", "got NaN"),
    "message a text": chat('["Hi"]', "an object with a text as role", "got 'Hi'", field="messages[0]"),
    "message without role": chat(message(content="Hi"), "a text as role", "got {'content'", field="messages[1]"),
    "role a number": chat(message(role=1), "a text as role", "got {'role': 1}", field="messages[1]"),
    "content a number": chat(message(role="user", content=3), "a text or a list", "got 3", field="messages[1].content"),
    "content an image": chat(
        message(role="user", content=[{"type": "image_url"}]),
        'parts of type "text" only',
        "got {'type': 'image_url'}",
        field="messages[1].content",
    ),
    # The JSON of the sampling parameters.
    "JSON unfinished": raw("{", "a JSON object", "at character 1"),
    "JSON followed by more": raw("{} {}", "a JSON object", "Extra data at character 3"),
    "JSON a list": raw("[1]", "a JSON object", "got list"),
    "JSON null": raw("null", "a JSON object", "got NoneType"),
    "JSON with a comment": raw("{} // no", "a JSON object", "at character 3"),
    "JSON with single quotes": raw("{'n': 1}", "a JSON object", "at character 1"),
    "JSON with a trailing comma": raw('{"n": 1,}', "a JSON object", "at character"),
    "JSON with a control character": raw('{"stop": "\n"}', "a JSON object", "at character 10"),
    "JSON too deep": raw("[" * 10_000, "at most 32 levels", "got 10000"),
    "JSON objects too deep": raw('{"stop":' * 1000, "at most 32 levels", "got 1000"),
    "JSON too long": raw(" " * (1 << 20), "at most 262144 bytes", "got 1048576"),
    "JSON lone surrogate": raw('{"stop": "\\ud800"}', "valid Unicode", "lone surrogate"),
    "key twice": raw('{"seed": 1, "seed": 2}', "not repeat a key", "got 'seed' 2 times"),
    "key twice among many": raw(
        f"{{{','.join(f'{chr(34)}{n}{chr(34)}:0' for n in range(20_000))},{chr(34)}19999{chr(34)}:1}}",
        "not repeat a key",
        "got '19999' 2 times",
    ),
    "NaN": raw('{"temperature": NaN}', "finite numbers only", "got NaN"),
    "infinity": raw('{"temperature": -Infinity}', "finite numbers only", "got -Infinity"),
    "number too large for a float": raw('{"temperature": 1e999}', "finite numbers only", "got 1e999"),
    "number of 5000 digits": raw('{"seed": ' + "9" * 5000 + "}", "at most 64 digits", "got one of 5000"),
    "unknown key": sampling("did you mean 'temperature'", "'temprature'", field="parameter", temprature=1),
    "unknown key unlike any": sampling("known ones: n, ", "'zzz'", field="parameter", zzz=1),
    "unknown long key": sampling("known ones: n, ", "xxx...", field="parameter", **{"x" * 100_000: 1}),
    # Numbers.
    "temperature below 0": sampling("[0, 100]", temperature=-0.1),
    "temperature above 100": sampling("[0, 100]", temperature=100.1),
    "temperature a list": sampling("[0, 100]", temperature=[]),
    "temperature true": sampling("[0, 100]", temperature=True),
    "temperature a word": sampling("[0, 100]", temperature="nan"),
    "temperature null": sampling("[0, 100]", "got None", temperature=None),
    "top_p 0": sampling("(0, 1]", top_p=0),
    "top_p above 1": sampling("(0, 1]", top_p=1.0001),
    "top_k below -1": sampling(f"[-1, {MAX_INTEGER}]", top_k=-2),
    "top_k a fraction": sampling(f"[-1, {MAX_INTEGER}]", top_k=1.5),
    "min_p below 0": sampling("[0, 1]", min_p=-0.1),
    "min_p above 1": sampling("[0, 1]", min_p=1.1),
    "presence_penalty": sampling("[-2, 2]", presence_penalty=2.1),
    "frequency_penalty": sampling("[-2, 2]", frequency_penalty=-2.1),
    "repetition_penalty": sampling("[0.01, 100]", repetition_penalty=0),
    "max_tokens 0": sampling(f"[1, {MAX_INTEGER}]", max_tokens=0),
    "max_tokens a word": sampling(f"[1, {MAX_INTEGER}]", max_tokens="many"),
    "max_tokens true": sampling(f"[1, {MAX_INTEGER}]", max_tokens=True),
    "max_tokens of 63 bits": sampling(f"[1, {MAX_INTEGER}]", max_tokens=2**63),
    "min_tokens negative": sampling(f"[0, {MAX_INTEGER}]", min_tokens=-1),
    "min_tokens above max_tokens": sampling("at most max_tokens (8)", min_tokens=9, max_tokens=8),
    "seed of 65 bits": sampling(f"[-1, {2**64 - 1}]", seed=2**64),
    "priority": sampling("[-2147483648, 2147483647]", priority=2**31),
    "truncate_prompt_tokens 0": sampling("-1 or at least 1", truncate_prompt_tokens=0),
    # What a request can multiply.
    "n 0": sampling("[1, 64]", n=0),
    "n 65": sampling("[1, 64]", n=65),
    "best_of 65": sampling("[1, 64]", best_of=65),
    "best_of below n": sampling("at least n (3)", best_of=2, n=3),
    "beam_width 1": sampling("[2, 64]", beam_width=1, temperature=0),
    "beam_width 10^9": sampling("[2, 64]", beam_width=10**9, temperature=0),
    "beams that draw": sampling("must be 0 with beam search", temperature=1, beam_width=2),
    "beams with stop": sampling("must be empty with beam search", "('x',)", stop="x", beam_width=2, temperature=0),
    "n above the beams": sampling("[1, 2]", n=3, beam_width=2, temperature=0),
    "logprobs negative": sampling("[0, max_logprobs]", logprobs=-1),
    "logprobs above the limit": sampling("[0, 20]", logprobs=21),
    "prompt_logprobs negative": sampling("[0, max_logprobs]", "got -1", prompt_logprobs=-1),
    "prompt_logprobs above the limit": sampling("[0, 20]", "got 21", prompt_logprobs=21),
    "stop a number": sampling("text or a list of texts", stop=3),
    "stop of numbers": sampling("texts of 1 to 1024 characters", "got 3", stop=[3]),
    "stop with an empty text": sampling("texts of 1 to 1024 characters", "got ''", stop=["x", ""]),
    "stop too long": sampling("texts of 1 to 1024 characters", "xxx...", stop="x" * 1025),
    "stops too many": sampling("at most 64 texts", "got 65", stop=["x"] * 65),
    "stop without text": sampling("needs detokenize to be true", "", stop="x", detokenize=False),
    "stop_token_ids negative": sampling("integers from 0 up", "got -1", stop_token_ids=[-1]),
    "stop_token_ids beyond the vocabulary": sampling("[0, 49151]", "got 49152", stop_token_ids=[49152]),
    "stop_token_ids fractions": sampling("integers from 0 up", "got 1.5", stop_token_ids=[1.5]),
    "stop_token_ids too many": sampling("at most 128 ids", "got 129", stop_token_ids=[1] * 129),
    "logit_bias a list": sampling("an object of biases by token id", logit_bias=[1]),
    "logit_bias of a word": sampling("token ids (integers from 0 up)", "got 'abc'", logit_bias={"abc": 1}),
    "logit_bias of -1": sampling("token ids (integers from 0 up)", "got '-1'", logit_bias={"-1": 1}),
    "logit_bias beyond the vocabulary": sampling("[0, 49151]", "got 49152", logit_bias={"49152": 1}),
    "logit_bias too large": sampling("[-100, 100]", "got 101", logit_bias={"1": 101}),
    "logit_bias a text": sampling("[-100, 100]", "got '1'", logit_bias={"1": "1"}),
    "logit_bias twice": sampling("every token id once", "got 1 twice", logit_bias={"1": 1, "01": 2}),
    "logit_bias too many": sampling("at most 1024 token ids", "got 1025", logit_bias=dict.fromkeys(range(1025), 0)),
    "allowed_token_ids empty": sampling("at least 1 id", allowed_token_ids=[]),
    "allowed_token_ids beyond the vocabulary": sampling("[0, 49151]", "got 49152", allowed_token_ids=[49152]),
    "allowed_token_ids too many": sampling("at most 1024 ids", "got 1025", allowed_token_ids=[1] * 1025),
    "allowed_token_ids nothing to draw": sampling("a token that", "", allowed_token_ids=[2], min_tokens=1),
    "bad_words a text": sampling("a list of texts", bad_words="x"),
    "bad_words of spaces": sampling("not only spaces", "got ' '", bad_words=[" "]),
    "bad_words too many": sampling("at most 128 texts", "got 129", bad_words=["x"] * 129),
    "bad_words too long": sampling("at most 1024 characters", "xxx...", bad_words=["x" * 1025]),
    "tenant too long": sampling("at most 128 characters", "xxx...", tenant="x" * 129),
    "tenant a number": sampling("a text of at most 128 characters", tenant=1),
    "cache_salt too long": sampling("1 to 128 characters", "got a text of 129", cache_salt="x" * 129),
    "cache_salt empty": sampling("1 to 128 characters", "got a text of 0", cache_salt=""),
    # Booleans, and what is not there.
    "ignore_eos a word": sampling("true or false", ignore_eos="maybe"),
    "ignore_eos a number": sampling("true or false", ignore_eos=1),
    "early_stopping a word": sampling('true, false or "never"', early_stopping="soon", beam_width=2, temperature=0),
    "length_penalty without beams": sampling("needs use_beam_search", "got 2.0", length_penalty=2),
    "prompt_logprobs with beams": sampling(
        "must be null or left out", "got 1", prompt_logprobs=1, beam_width=2, temperature=0
    ),
    "structured_outputs": sampling("must be left out", structured_outputs="{}"),
    "lora_name": sampling("not enabled", "LoRA", field="LoRA feature", lora_name="doll"),
}
