"""What goes over the wire: the table of input and output tensors, and how a response's tensors are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedcore.engine.sequence import FinishReason

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SequenceDelta:
    """What one response tells of one of the request's output sequences.

    `text`, `token_ids` and `logprobs` are what is new since the previous response, or all of it when the request does
    not stream. `cumulative_logprob` is the sum over all output tokens so far, `finish_reason` None until the last one.
    `logprobs` is JSON: null, or a list with one object per new token, from token id to its `Logprob` fields.
    """

    text: str
    finish_reason: FinishReason | None = None
    token_ids: Sequence[int] = ()
    cumulative_logprob: float = 0.0
    logprobs: str = "null"


@dataclass(frozen=True)
class OutputDelta:
    """What one response tells: of each of the request's n sequences, in the order of their indices, and of the prompt.

    `prompt_logprobs` is JSON: a list with null for the first token, then an object as in `SequenceDelta.logprobs` per token;
    null in all responses but the first one.
    """

    sequences: Sequence[SequenceDelta]
    num_input_tokens: int = 0
    prompt_logprobs: str = "null"


@dataclass(frozen=True)
class InputTensor:
    """A row of the tensor table: an input, its Triton type and its shape on the wire."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)

    def config(self) -> dict[str, Any]:
        # Also the prompt is optional for Triton, whose own check counts the inputs only; `parse_request` demands it.
        return {"name": self.name, "data_type": self.data_type, "dims": list(self.dims), "optional": True}


@dataclass(frozen=True)
class OutputTensor:
    """A row of the tensor table: an output, the input that asks for it (none: always sent), and how it is made."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    asked_by: str | None
    encode: Callable[[OutputDelta], Array]

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "data_type": self.data_type, "dims": list(self.dims)}


def _texts(texts: Iterable[str]) -> Array:
    return np.array([text.encode() for text in texts], dtype=np.object_)


def _finish_reasons(delta: OutputDelta) -> Array:
    reasons = [sequence.finish_reason for sequence in delta.sequences]
    return _texts("None" if reason is None else reason.value for reason in reasons)


def _token_ids(delta: OutputDelta) -> Array:
    return _texts(f"[{', '.join(map(str, sequence.token_ids))}]" for sequence in delta.sequences)


INPUTS = (
    InputTensor("text_input", "TYPE_STRING"),
    InputTensor("messages", "TYPE_STRING"),
    InputTensor("input_ids", "TYPE_INT32", (-1,)),
    InputTensor("image", "TYPE_STRING", (-1,)),
    InputTensor("stream", "TYPE_BOOL"),
    InputTensor("sampling_parameters", "TYPE_STRING"),
    InputTensor("exclude_input_in_output", "TYPE_BOOL"),
    InputTensor("return_finish_reason", "TYPE_BOOL"),
    InputTensor("return_cumulative_logprob", "TYPE_BOOL"),
    InputTensor("return_logprobs", "TYPE_BOOL"),
    InputTensor("return_num_input_tokens", "TYPE_BOOL"),
    InputTensor("return_num_output_tokens", "TYPE_BOOL"),
    InputTensor("return_token_ids", "TYPE_BOOL"),
    InputTensor("return_prompt_logprobs", "TYPE_BOOL"),
    InputTensor("embedding_request", "TYPE_STRING"),
)
OUTPUTS = (
    OutputTensor("text_output", "TYPE_STRING", (-1,), None, lambda delta: _texts(s.text for s in delta.sequences)),
    OutputTensor("finish_reason", "TYPE_STRING", (-1,), "return_finish_reason", _finish_reasons),
    OutputTensor(
        "cumulative_logprob",
        "TYPE_FP32",
        (-1,),
        "return_cumulative_logprob",
        lambda delta: np.array([s.cumulative_logprob for s in delta.sequences], dtype=np.float32),
    ),
    OutputTensor(
        "logprobs",
        "TYPE_STRING",
        (-1,),
        "return_logprobs",
        lambda delta: _texts(s.logprobs for s in delta.sequences),
    ),
    OutputTensor(
        "num_input_tokens",
        "TYPE_UINT32",
        (1,),
        "return_num_input_tokens",
        lambda delta: np.array([delta.num_input_tokens], dtype=np.uint32),
    ),
    OutputTensor(
        "num_output_tokens",
        "TYPE_UINT32",
        (-1,),
        "return_num_output_tokens",
        lambda delta: np.array([len(s.token_ids) for s in delta.sequences], dtype=np.uint32),
    ),
    OutputTensor("token_ids", "TYPE_STRING", (-1,), "return_token_ids", _token_ids),
    OutputTensor(
        "prompt_logprobs",
        "TYPE_STRING",
        (1,),
        "return_prompt_logprobs",
        lambda delta: _texts([delta.prompt_logprobs]),
    ),
)


def encode(delta: OutputDelta, outputs: Iterable[OutputTensor]) -> dict[str, Array]:
    """The tensors of a response, by name: those of `outputs`."""
    return {output.name: output.encode(delta) for output in outputs}


def num_bytes(array: Array) -> int:
    """What a tensor takes, nearly; texts are bytes objects."""
    return sum(map(len, array.tolist())) if array.dtype == np.object_ else array.nbytes
