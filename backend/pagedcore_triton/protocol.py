"""What goes over the wire: the tensor table, and pure functions between tensors and the engine's types."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.errors import RequestError

Array = npt.NDArray[Any]

MAX_PROMPT_BYTES = 1 << 20
MAX_PARAMETERS_BYTES = 256 << 10
STREAMING_ECHO = "When streaming, `exclude_input_in_output` = False is not allowed."


@dataclass(frozen=True)
class OutputDelta:
    """What one response tells: the text since the previous response, or all of it when the request does not stream."""

    text: str


@dataclass(frozen=True)
class GenerateRequest:
    """A parsed request. `echo`: the one response begins with the prompt."""

    prompt: str
    stream: bool
    echo: bool
    sampling_params: SamplingParams


@dataclass(frozen=True)
class InputTensor:
    """A row of the tensor table: an input, its Triton type and its shape on the wire."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)

    def config(self) -> dict[str, Any]:
        # Also text_input is optional for Triton, whose own check counts the inputs only; `parse_request` demands it.
        return {"name": self.name, "data_type": self.data_type, "dims": list(self.dims), "optional": True}


@dataclass(frozen=True)
class OutputTensor:
    """A row of the tensor table: an output and how it is made from a delta."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    encode: Callable[[OutputDelta], Array]

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "data_type": self.data_type, "dims": list(self.dims)}


def _text(text: str) -> Array:
    return np.array([text.encode()], dtype=np.object_)


INPUTS = (
    InputTensor("text_input", "TYPE_STRING"),
    InputTensor("stream", "TYPE_BOOL"),
    InputTensor("sampling_parameters", "TYPE_STRING"),
    InputTensor("exclude_input_in_output", "TYPE_BOOL"),
)
OUTPUTS = (OutputTensor("text_output", "TYPE_STRING", (-1,), lambda delta: _text(delta.text)),)


def parse_request(inputs: Mapping[str, Array], parameters: str) -> GenerateRequest:
    """Check and decode a request.

    Args:
        inputs: the input tensors that were sent, by name; strings are arrays of bytes objects.
        parameters: the request's own parameters as a JSON object; used only without a sampling_parameters tensor.

    Raises:
        RequestError: the text names the input or parameter, what is allowed and what was given.
    """
    if "text_input" not in inputs:
        raise RequestError("text_input is required: the prompt, a text of at least 1 character")
    prompt = _decode_utf8("text_input", _string(inputs, "text_input"), MAX_PROMPT_BYTES)
    if not prompt:
        raise RequestError("text_input must be at least 1 character, got an empty text")
    stream = _flag(inputs, "stream", False)
    exclude_input = _flag(inputs, "exclude_input_in_output", stream)
    if stream and not exclude_input:
        raise RequestError(STREAMING_ECHO)
    if "sampling_parameters" in inputs:
        content = _decode_utf8("sampling_parameters", _string(inputs, "sampling_parameters"), MAX_PARAMETERS_BYTES)
        sampling_params = SamplingParams.from_dict(parse_json_object("sampling_parameters", content))
    else:
        sampling_params = SamplingParams.from_dict(parse_json_object("the request's parameters", parameters))
    if sampling_params.n != 1:
        raise RequestError(f"n must be 1 in this version, got {sampling_params.n}")
    if not sampling_params.detokenize:
        raise RequestError("detokenize must be true: the output is text, got False")
    return GenerateRequest(prompt, stream, not exclude_input, sampling_params)


def encode(delta: OutputDelta) -> dict[str, Array]:
    """The output tensors of a response, by name."""
    return {output.name: output.encode(delta) for output in OUTPUTS}


def parse_json_object(name: str, text: str) -> dict[str, Any]:
    """Decode a JSON object strictly: no duplicate keys, NaN, Infinity, lone surrogates, or text after it.

    `name` is what the error calls it. Raises RequestError.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise RequestError(f"{name} must not repeat a key, got {ascii(repeated)[:64]} twice")
        return values

    def refuse(constant: str) -> None:
        raise RequestError(f"{name} must hold finite numbers only, got {constant}")

    if not text:
        return {}
    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RequestError(f"{name} must be a JSON object: {error.msg} at character {error.pos}") from error
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} must hold valid Unicode text, got a lone surrogate") from error
    except RecursionError as error:
        raise RequestError(f"{name} must be a JSON object, got one nested too deeply") from error
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"{name} must be a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"{name} must be a JSON object, got {type(values).__name__}")
    return values


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
