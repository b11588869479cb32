"""The tensor table and the encoding of responses."""

from __future__ import annotations

import numpy as np
from pagedcore_triton.protocol import INPUTS, OUTPUTS, OutputDelta, SequenceDelta, encode

from pagedcore.engine.sequence import FinishReason

FLAGS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens", "token_ids")


def test_the_inputs_are_vllm_backends_and_four_more() -> None:
    table = {row.name: (row.data_type, row.dims) for row in INPUTS}
    expected = dict.fromkeys(("text_input", "sampling_parameters", "embedding_request"), ("TYPE_STRING", (1,)))
    expected |= dict.fromkeys(("stream", "exclude_input_in_output"), ("TYPE_BOOL", (1,)))
    expected |= {f"return_{name}": ("TYPE_BOOL", (1,)) for name in FLAGS}
    expected |= {"image": ("TYPE_STRING", (-1,)), "messages": ("TYPE_STRING", (1,)), "input_ids": ("TYPE_INT32", (-1,))}
    expected["return_prompt_logprobs"] = ("TYPE_BOOL", (1,))
    assert table == expected
    assert all(row.config()["optional"] for row in INPUTS)


def test_the_outputs_are_vllm_backends_and_two_more() -> None:
    assert [(row.name, row.data_type, row.dims, row.asked_by) for row in OUTPUTS] == [
        ("text_output", "TYPE_STRING", (-1,), None),
        ("finish_reason", "TYPE_STRING", (-1,), "return_finish_reason"),
        ("cumulative_logprob", "TYPE_FP32", (-1,), "return_cumulative_logprob"),
        ("logprobs", "TYPE_STRING", (-1,), "return_logprobs"),
        ("num_input_tokens", "TYPE_UINT32", (1,), "return_num_input_tokens"),
        ("num_output_tokens", "TYPE_UINT32", (-1,), "return_num_output_tokens"),
        ("token_ids", "TYPE_STRING", (-1,), "return_token_ids"),
        ("prompt_logprobs", "TYPE_STRING", (1,), "return_prompt_logprobs"),
    ]


def test_tensors_have_one_element_per_sequence_or_one_of_the_prompt() -> None:
    delta = OutputDelta(
        [
            SequenceDelta("na\u00efve", None, [5, 6], -1.5, '[{"5": {}}]'),
            SequenceDelta("", FinishReason.STOP, [], -2.0),
        ],
        num_input_tokens=7,
        prompt_logprobs='[null, {"8": {}}]',
    )
    tensors = encode(delta, OUTPUTS)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "text_output": ["na\u00efve".encode(), b""],
        "finish_reason": [b"None", b"stop"],
        "cumulative_logprob": [-1.5, -2.0],
        "logprobs": [b'[{"5": {}}]', b"null"],
        "num_input_tokens": [7],
        "num_output_tokens": [2, 0],
        "token_ids": [b"[5, 6]", b"[]"],
        "prompt_logprobs": [b'[null, {"8": {}}]'],
    }
    assert tensors["cumulative_logprob"].dtype == np.float32
    assert tensors["num_input_tokens"].dtype == tensors["num_output_tokens"].dtype == np.uint32
    assert list(encode(delta, OUTPUTS[:1])) == ["text_output"]
