"""From a request's input tensors to what the engine is asked: pure functions that check everything a client can get wrong."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.errors import RequestError, shown
from pagedcore.json_text import parse_json_list, parse_json_object
from pagedcore.text import Tokenizer
from pagedcore_triton.protocol import OUTPUTS, Array, OutputTensor

MAX_PROMPT_BYTES = 1 << 20
MAX_PROMPT_IDS = 1 << 20
MAX_PARAMETERS_BYTES = 256 << 10
MAX_REMEMBERED_LENGTH, NUM_REMEMBERED = 2048, 256  # of texts of sampling parameters
MAX_LOGPROBS_AT_ONCE = 1 << 20  # about 80 MB of JSON
MAX_REQUEST_ID_LENGTH = 256  # Triton repeats it with every response
MAX_CACHE_SALT_LENGTH = 128
MAX_TIMEOUT = 2**63 - 1  # microseconds
STREAMING_ECHO = "When streaming, `exclude_input_in_output` = False is not allowed."
PROMPT_INPUTS = ("text_input", "messages", "input_ids")


class LoraDisabledError(RequestError):
    """The request names a LoRA adapter; vllm_backend's clients know the text, which comes without a prefix there."""

    def __init__(self) -> None:
        super().__init__("LoRA feature is not enabled.")


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that the model's chat template turns into the prompt."""

    messages: list[Any]


Prompt = str | ChatPrompt | list[int]  # the last: token ids


@dataclass(frozen=True)
class GenerateRequest:
    """A parsed request.

    `echo`: the one response begins with the prompt. `outputs`: the tensors of its responses. `sampling_params` are the
    engine's: they ask for log probabilities where an output needs them. `wants_logprobs`, `wants_prompt_logprobs`: the client
    asked for those, and for the outputs that tell them.
    `cache_salt` keeps the prompt's entries in the prefix cache apart from those of every other salt.
    """

    prompt: Prompt
    stream: bool
    echo: bool
    outputs: tuple[OutputTensor, ...]
    sampling_params: SamplingParams
    wants_logprobs: bool
    wants_prompt_logprobs: bool
    cache_salt: str = ""


def parse_request(
    inputs: Mapping[str, Array],
    parameters: str,
    requested_outputs: Iterable[str],
    *,
    model_name: str,
    request_id: str = "",
) -> GenerateRequest:
    """Check and decode a request.

    Args:
        inputs: the input tensors that were sent, by name; strings are arrays of bytes objects.
        parameters: the request's own parameters as a JSON object; used only without a sampling_parameters tensor.
        requested_outputs: names of the outputs that the client wants; Triton names all of them if it did not say.
        request_id: what the client calls the request; it need not be unique.

    Raises:
        RequestError: the text names the input or parameter, what is allowed and what was given.
    """
    if len(request_id) > MAX_REQUEST_ID_LENGTH:
        raise RequestError(f"id must have at most {MAX_REQUEST_ID_LENGTH} characters, got {len(request_id)}")
    if "embedding_request" in inputs:
        raise RequestError(f"Model {model_name} does not support 'embed' request: embedding_request must be left out")
    if "image" in inputs:
        raise RequestError(f"image must be left out: model {model_name} takes text only")
    prompt = _parse_prompt(inputs)
    stream = _flag(inputs, "stream", False)
    exclude_input = _flag(inputs, "exclude_input_in_output", stream or not isinstance(prompt, str))
    if stream and not exclude_input:
        raise RequestError(STREAMING_ECHO)
    requested = set(requested_outputs)
    outputs = tuple(
        output
        for output in OUTPUTS
        if output.name in requested and (output.asked_by is None or _flag(inputs, output.asked_by, False))
    )
    params, cache_salt = _parse_sampling_parameters(inputs, parameters)
    names = {output.name for output in outputs}
    wants_logprobs = "logprobs" in names and params.logprobs is not None
    if "cumulative_logprob" in names and params.logprobs is None and not params.ranks_outputs:
        params = dataclasses.replace(params, logprobs=0)
    return GenerateRequest(
        prompt,
        stream,
        echo=not exclude_input,
        outputs=outputs,
        sampling_params=params,
        wants_logprobs=wants_logprobs,
        wants_prompt_logprobs="prompt_logprobs" in names and params.prompt_logprobs is not None,
        cache_salt=cache_salt,
    )


def parse_timeout(parameters: str) -> int:
    """A request's timeout in microseconds as Triton's HTTP generate endpoints pass it on, among the parameters; 0 for none.

    Raises RequestError.
    """
    if '"timeout"' not in parameters:
        return 0
    timeout = parse_json_object("the request's parameters", parameters).get("timeout", 0)
    if isinstance(timeout, bool) or not isinstance(timeout, int) or not 0 <= timeout <= MAX_TIMEOUT:
        raise RequestError(f"timeout must be an integer in [0, {MAX_TIMEOUT}] (microseconds), got {shown(timeout)}")
    return timeout


def check_response_size(generate: GenerateRequest, num_prompt_tokens: int, max_model_len: int) -> None:
    """Raise RequestError where the log probabilities of all tokens could be too many for the one response they go into."""
    params = generate.sampling_params
    if generate.stream or not generate.wants_logprobs or params.logprobs is None:
        return
    num_tokens = max_model_len - num_prompt_tokens
    if params.max_tokens is not None:
        num_tokens = min(num_tokens, params.max_tokens)
    count = params.n * num_tokens * (params.logprobs + 1)
    if count > MAX_LOGPROBS_AT_ONCE:
        raise RequestError(
            f"logprobs must have at most {MAX_LOGPROBS_AT_ONCE} entries in one response, got {params.n} x {num_tokens} tokens "
            f"x {params.logprobs + 1} = {count}; send stream, or lower max_tokens, n or logprobs"
        )


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, max_tokens: int | None = None) -> list[int]:
    """The prompt's token ids.

    Raises:
        RequestError: messages do not fit the model's chat template, or the text certainly has more than `max_tokens`
            (None: no limit), which is found out without the time that encoding it would take. What it lets pass may still
            have more.
    """
    if isinstance(prompt, list):
        return prompt
    is_chat = isinstance(prompt, ChatPrompt)
    text = tokenizer.apply_chat_template(prompt.messages) if isinstance(prompt, ChatPrompt) else prompt
    if max_tokens is not None and (fewest := tokenizer.fewest_tokens(text)) > max_tokens:
        raise RequestError(f"the prompt has at least {fewest} tokens; it must have at most {max_tokens}")
    return tokenizer.encode(text, add_special_tokens=not is_chat)


def _parse_prompt(inputs: Mapping[str, Array]) -> Prompt:
    given = [name for name in PROMPT_INPUTS if name in inputs]
    if not given:
        raise RequestError(
            "text_input is required: the prompt, a text of at least 1 character (or messages, or input_ids)"
        )
    if len(given) > 1:
        raise RequestError(f"one of {', '.join(PROMPT_INPUTS)} must be sent, got {' and '.join(given)}")
    if given[0] == "text_input":
        text = _decode_utf8("text_input", _string(inputs, "text_input"), MAX_PROMPT_BYTES)
        if not text:
            raise RequestError("text_input must be at least 1 character, got an empty text")
        return text
    if given[0] == "messages":
        text = _decode_utf8("messages", _string(inputs, "messages"), MAX_PROMPT_BYTES)
        return ChatPrompt(parse_json_list("messages", text))
    token_ids = inputs["input_ids"]
    if token_ids.ndim != 1 or token_ids.size == 0:
        raise RequestError(f"input_ids must have the shape [n], n at least 1, got {list(token_ids.shape)}")
    if token_ids.size > MAX_PROMPT_IDS:
        raise RequestError(f"input_ids must hold at most {MAX_PROMPT_IDS} ids, got {token_ids.size}")
    ids: list[int] = token_ids.tolist()
    if min(ids) < 0:
        raise RequestError(f"input_ids must be token ids (integers from 0 up), got {min(ids)}")
    return ids


def _parse_sampling_parameters(inputs: Mapping[str, Array], parameters: str) -> tuple[SamplingParams, str]:
    """The sampling parameters, and the cache_salt that may stand among them."""
    name = "the request's parameters"
    if len(parameters) > MAX_PARAMETERS_BYTES:  # also beside the tensor: a timeout is looked for in them
        raise RequestError(f"{name} must have at most {MAX_PARAMETERS_BYTES} characters, got {len(parameters)}")
    is_tensor = "sampling_parameters" in inputs
    if is_tensor:
        name = "sampling_parameters"
        parameters = _decode_utf8(name, _string(inputs, name), MAX_PARAMETERS_BYTES)
    parse = _parse_remembered if len(parameters) <= MAX_REMEMBERED_LENGTH else _parse_parameters
    return parse(name, parameters, is_tensor)


def _parse_parameters(name: str, text: str, is_tensor: bool) -> tuple[SamplingParams, str]:
    values = parse_json_object(name, text)
    if not is_tensor:
        values.pop("timeout", None)  # see parse_timeout
    if values.pop("lora_name", None) is not None:
        raise LoraDisabledError
    cache_salt = _parse_cache_salt(values.pop("cache_salt", None))
    return SamplingParams.from_dict(values), cache_salt


# Most requests of a client have the same parameters, and parsing them is half the work of taking a request in.
_parse_remembered = functools.lru_cache(maxsize=NUM_REMEMBERED)(_parse_parameters)


def _parse_cache_salt(salt: Any) -> str:
    if salt is None:
        return ""
    if not isinstance(salt, str) or not 1 <= len(salt) <= MAX_CACHE_SALT_LENGTH:
        given = f"a text of {len(salt)} characters" if isinstance(salt, str) else shown(salt)
        raise RequestError(f"cache_salt must be a text of 1 to {MAX_CACHE_SALT_LENGTH} characters, got {given}")
    return salt


def _string(inputs: Mapping[str, Array], name: str) -> bytes:
    value = _single(inputs, name)
    if not isinstance(value, bytes):
        raise RequestError(f"{name} must be a text, got {type(value).__name__}")
    return value


def _flag(inputs: Mapping[str, Array], name: str, default: bool) -> bool:
    return bool(_single(inputs, name)) if name in inputs else default


def _single(inputs: Mapping[str, Array], name: str) -> Any:
    array = inputs[name]
    if array.shape != (1,):
        raise RequestError(f"{name} must have the shape [1], got {list(array.shape)}")
    return array[0]


def _decode_utf8(name: str, data: bytes, max_bytes: int) -> str:
    if len(data) > max_bytes:
        raise RequestError(f"{name} must have at most {max_bytes} bytes, got {len(data)}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} must be valid UTF-8, got byte 0x{data[error.start]:02x} at {error.start}"
        ) from error
