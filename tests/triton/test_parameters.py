"""Sampling parameters through the real server, with transformers as the judge of what they must do to the text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import Response, generate, responses_of
from tests.triton.judge import Continuation, Judge
from tests.triton.samples import Growth

PROMPT = "The capital of France is"
NUM_TOKENS = 12
GREEDY = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def plain(judge: Judge) -> Continuation:
    return judge.continuation(PROMPT, NUM_TOKENS)


def ask(server: TritonServer, sampling: dict[str, Any], **inputs: Any) -> list[Response]:
    """The responses to a stream, with the prompt unless the inputs have one."""
    prompt = {} if "input_ids" in inputs else {"text_input": PROMPT}
    sent = prompt | {"stream": True, "sampling_parameters": json.dumps(GREEDY | sampling)} | inputs
    return responses_of(server.grpc_url, sent)


def text_of(responses: list[Response]) -> str:
    return "".join(response.values["text_output"][0] for response in responses)


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_bad_words(server: TritonServer, judge: Judge, plain: Continuation, num_tokens: int) -> None:
    """Of one token and of several: only the last one is not drawn, and only after the others."""
    ids = plain.token_ids
    words = [judge.tokenizer.decode(ids[i : i + num_tokens]).strip() for i in range(2, NUM_TOKENS - num_tokens)]
    spelled = [[judge.tokenizer(prefix + word).input_ids for prefix in ("", " ")] for word in words]
    at = next(i for i, both in enumerate(spelled, start=2) if ids[i : i + num_tokens] in both)
    word, spellings = words[at - 2], spelled[at - 2]

    def ban(logits: torch.Tensor, output: list[int]) -> None:
        for spelling in spellings:
            if len(spelling) == num_tokens and output[len(output) - num_tokens + 1 :] == spelling[:-1]:
                logits[spelling[-1]] = -torch.inf

    expected = judge.continuation(PROMPT, NUM_TOKENS, ban)
    assert expected.token_ids != ids
    assert text_of(ask(server, {"bad_words": [word, "never there"]})) == expected.text
    assert text_of(ask(server, {"bad_words": []})) == plain.text


def test_logit_bias(server: TritonServer, judge: Judge, plain: Continuation) -> None:
    biases = {plain.token_ids[2]: -100.0, plain.token_ids[5]: 4.5, 1000: 100.0}

    def add(logits: torch.Tensor, output: list[int]) -> None:
        for token_id, bias in biases.items():
            logits[token_id] += bias if token_id != 1000 else -100.0

    expected = judge.continuation(PROMPT, NUM_TOKENS, add)
    by_text = {str(token_id): bias for token_id, bias in (biases | {1000: -100}).items()}
    assert expected.text != plain.text
    assert text_of(ask(server, {"logit_bias": by_text})) == expected.text
    always = ask(server, {"logit_bias": {"1000": 100}, "max_tokens": 3}, return_token_ids=True)
    assert [json.loads(response.values["token_ids"][0]) for response in always] == [[1000]] * 3


def test_allowed_token_ids(server: TritonServer, judge: Judge) -> None:
    """The log probabilities stay the model's own."""
    allowed = judge.tokenizer(" yes no maybe").input_ids

    def keep(logits: torch.Tensor, output: list[int]) -> None:
        kept = logits[allowed].clone()
        logits[:] = -torch.inf
        logits[allowed] = kept

    expected = judge.continuation(PROMPT, NUM_TOKENS, keep)
    responses = ask(server, {"allowed_token_ids": allowed}, return_cumulative_logprob=True)
    assert text_of(responses) == expected.text
    total = sum(expected.logprobs[i][token_id] for i, token_id in enumerate(expected.token_ids))
    assert responses[-1].values["cumulative_logprob"][0] == pytest.approx(total, abs=5e-3)


def test_truncate_prompt_tokens(server: TritonServer, judge: Judge, plain: Continuation) -> None:
    """The last tokens are kept; -1 makes any prompt fit."""
    expected = judge.continuation(plain.prompt_ids[-3:], NUM_TOKENS)
    responses = ask(server, {"truncate_prompt_tokens": 3}, return_num_input_tokens=True)
    assert text_of(responses) == expected.text
    assert {response.values["num_input_tokens"][0] for response in responses} == {3}
    same = ask(server, {"truncate_prompt_tokens": 3}, input_ids=plain.prompt_ids)
    assert text_of(same) == expected.text
    long = ask(server, {"truncate_prompt_tokens": -1}, text_input=" a" * 3000, return_num_input_tokens=True)
    assert [response.values["num_input_tokens"][0] for response in long] == [1023]


def test_special_tokens_are_shown_on_request(server: TritonServer, judge: Judge) -> None:
    prompt = "<|im_start|>user\nSay only the word yes.<|im_end|>\n<|im_start|>assistant\n"
    expected = judge.continuation(prompt, NUM_TOKENS)
    assert "<|im_end|>" in expected.text
    for skip in (True, False):
        shown = text_of(ask(server, {"skip_special_tokens": skip}, text_input=prompt))
        assert shown == judge.tokenizer.decode(expected.token_ids, skip_special_tokens=skip)
    ended = ask(server, {"skip_special_tokens": False, "ignore_eos": False}, text_input=prompt)
    assert text_of(ended) == expected.text.partition("<|im_end|>")[0]
    including = {"skip_special_tokens": False, "ignore_eos": False, "include_stop_str_in_output": True}
    assert text_of(ask(server, including, text_input=prompt)) == expected.text.partition("<|im_end|>")[0] + "<|im_end|>"


def test_messages_are_rendered_by_the_models_own_template(server: TritonServer, judge: Judge) -> None:
    """As transformers renders them, and without more special tokens; the prompt is echoed on request only."""
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Say only the word yes."}]
    rendered = judge.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids = judge.tokenizer(rendered, add_special_tokens=False).input_ids
    expected = judge.continuation(prompt_ids, 2)
    inputs = {"messages": json.dumps(messages), "return_num_input_tokens": True}
    inputs["sampling_parameters"] = json.dumps(GREEDY | {"max_tokens": 2})
    (answer,) = responses_of(server.grpc_url, inputs)
    assert answer.values == {"text_output": [expected.text], "num_input_tokens": [len(prompt_ids)]}
    (echoed,) = responses_of(server.grpc_url, inputs | {"exclude_input_in_output": False})
    assert echoed.values["text_output"] == [rendered + expected.text]
    body = {"messages": json.dumps(messages), "stream": True, "max_tokens": 2, "temperature": 0}
    assert generate(server.http_url, body, stream=True).text == expected.text


def test_without_detokenization_there_are_token_ids_only(server: TritonServer, plain: Continuation) -> None:
    sampling = {"detokenize": False, "logprobs": 0}
    responses = ask(server, sampling, return_token_ids=True, return_logprobs=True, return_finish_reason=True)
    assert text_of(responses) == ""
    assert [json.loads(response.values["token_ids"][0]) for response in responses] == [[i] for i in plain.token_ids]
    decoded = [json.loads(response.values["logprobs"][0])[0] for response in responses]
    assert [next(iter(position.values()))["decoded_token"] for position in decoded] == [None] * NUM_TOKENS
    assert responses[-1].values["finish_reason"] == ["length"]


def test_what_the_openai_frontend_sends_is_taken(server: TritonServer) -> None:
    """All parameters at once, typed, with the flags it always sets; it reads element 0 of each output."""
    sampling = {
        "temperature": 0.7,
        "top_p": 1.0,
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": False,
        "min_tokens": 2,
        "seed": 7,
        "stop": ["###"],
        "max_tokens": 5,
        "logprobs": 1,
    }
    flags = {"return_logprobs": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
    inputs = {"text_input": PROMPT, "exclude_input_in_output": True, "sampling_parameters": json.dumps(sampling)}
    (whole,) = responses_of(server.grpc_url, inputs | flags | {"stream": False})
    assert all(len(value) == 1 for value in whole.values.values())
    pieces = responses_of(server.grpc_url, inputs | flags | {"stream": True})
    assert text_of(pieces) == whole.values["text_output"][0]
    total = sum(response.values["num_output_tokens"][0] for response in pieces)
    assert total == whole.values["num_output_tokens"][0] == len(pieces) == 5


def test_what_genai_perf_sends_is_taken(server: TritonServer) -> None:
    """Numbers are texts, and min_tokens must hold."""
    content = '{"max_tokens":"20","min_tokens":"20"}'
    inputs = {"text_input": PROMPT, "exclude_input_in_output": True, "stream": True, "sampling_parameters": content}
    assert len(responses_of(server.grpc_url, inputs)) == 20


def test_parameters_of_vllm_that_ask_for_nothing_are_taken(server: TritonServer, plain: Continuation) -> None:
    sampling = {
        "prompt_logprobs": None,
        "prompt_logprob_start": None,
        "flat_logprobs": False,
        "structured_outputs": None,
        "best_of": None,
        "priority": 0,
    }
    answer = generate(server.http_url, {"text_input": PROMPT, "sampling_parameters": json.dumps(GREEDY | sampling)})
    assert answer.text == PROMPT + plain.text


def test_a_cache_salt_keeps_prefixes_apart(server: TritonServer) -> None:
    """Prompts find in the prefix cache what came with the same salt only, and say the same in any case."""
    prompt = "Of all the ships that ever left this harbour " * 8
    growth, texts, found = Growth(server), set(), []
    num_queries = 0.0
    for number, salt in enumerate(({"cache_salt": "a"}, {"cache_salt": "b"}, {}, {"cache_salt": "a"}), 1):
        hits = growth.of("vllm:prefix_cache_hits_total")
        (answer,) = responses_of(
            server.grpc_url,
            {"text_input": prompt, "sampling_parameters": json.dumps(GREEDY | salt), "return_num_input_tokens": True},
        )
        num_queries += answer.values["num_input_tokens"][0]
        growth.wait_for("vllm:request_success_total", number, finished_reason="length")  # exported after the hits
        growth.wait_for("vllm:prefix_cache_queries_total", num_queries)
        texts.add(answer.values["text_output"][0])
        found.append(growth.of("vllm:prefix_cache_hits_total") - hits > 0)
    assert found == [False, False, False, True]
    assert len(texts) == 1
