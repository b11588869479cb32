"""What a request must be answered: the fake model by itself, one sequence at a time, without blocks, batches or steps."""

from __future__ import annotations

from dataclasses import dataclass

from pagedcore.engine.logprobs import TokenLogprobs
from pagedcore.engine.request import Request
from pagedcore.engine.seeds import mix_seed
from pagedcore.engine.sequence import FinishReason
from tests.simulation.fake_model import (
    EOS,
    ROOT,
    VOCAB_SIZE,
    context_after,
    context_of,
    draw,
    entry,
    logprobs,
    most_likely,
)


@dataclass(frozen=True)
class Answer:
    """One output of a request. `logprob`: of all its tokens, where outputs are ranked or log probabilities were asked for."""

    token_ids: list[int]
    reason: FinishReason
    logprob: float | None


def answers(request: Request, max_model_len: int) -> list[Answer]:
    """The outputs of a request that nothing disturbs, by index; of best_of, all that are drawn, in the order of their draws."""
    params = request.sampling_params
    assert params.max_tokens is not None
    stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {EOS})
    max_output = min(params.max_tokens, max_model_len - len(request.prompt_token_ids))
    if params.beam_width is not None:
        return _beam_search(request, params.beam_width, max_output, stops)
    wants_logprobs = params.ranks_outputs or params.logprobs is not None
    return [
        _sample(request.prompt_token_ids, _seed(request, index), max_output, stops, wants_logprobs)
        for index in range(params.num_sequences)
    ]


def best_answers(request: Request, all_answers: list[Answer]) -> list[Answer]:
    """Of the sequences that a request draws, those that it is answered with, in order."""
    params = request.sampling_params
    if params.beam_width is None and params.ranks_outputs:
        all_answers = sorted(all_answers, key=lambda answer: -(answer.logprob or 0.0))
    return all_answers[: params.n]


def prompt_logprobs(token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """Of the second token of a prompt and of those behind it."""
    positions = []
    for at, token_id in enumerate(token_ids[1:], 1):
        values = logprobs(context_after(token_ids[:at]))
        top = most_likely(values, num_top)
        rank = 1 + sum(value > values[token_id] for value in values)
        positions.append(TokenLogprobs(values[token_id], rank, top, [values[other] for other in top]))
    return positions


def _seed(request: Request, index: int) -> int | None:
    params = request.sampling_params
    if params.temperature == 0:
        return None
    assert params.seed is not None
    return params.seed if index == 0 else mix_seed(params.seed, index)


def _sample(
    prompt: list[int], seed: int | None, max_output: int, stops: frozenset[int], wants_logprobs: bool
) -> Answer:
    entries: list[int] = []
    before = ROOT
    for position, token_id in enumerate(prompt):
        before = entry(before, token_id, position)
        entries.append(before)
    output: list[int] = []
    total = 0.0
    while True:
        context = context_of(entries)
        token_id = draw(context, seed, len(output))
        output.append(token_id)
        if wants_logprobs:
            total += logprobs(context)[token_id]
        if token_id in stops or len(output) == max_output:
            reason = FinishReason.STOP if token_id in stops else FinishReason.LENGTH
            return Answer(output, reason, total if wants_logprobs else None)
        before = entry(before, token_id, len(entries))
        entries.append(before)


def _beam_search(request: Request, width: int, max_output: int, stops: frozenset[int]) -> list[Answer]:
    """Beam search with the rules of Hugging Face transformers, over the whole vocabulary of every beam."""
    params, prompt = request.sampling_params, request.prompt_token_ids
    open_beams: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, Answer]] = []  # with their scores
    while True:
        candidates = []
        for place, (logprob, output) in enumerate(open_beams):
            values = logprobs(context_after([*prompt, *output]))
            for likelihood_rank, token_id in enumerate(most_likely(values, VOCAB_SIZE)):
                candidates.append((-(logprob + values[token_id]), place, likelihood_rank, token_id))
        candidates.sort()
        length = len(open_beams[0][1]) + 1
        at_end = length == max_output
        next_beams: list[tuple[float, list[int]]] = []
        for rank, (cost, place, _, token_id) in enumerate(candidates[: width * (1 + len(stops))]):
            output = [*open_beams[place][1], token_id]
            if token_id not in stops:
                next_beams.append((-cost, output))
            if rank < width and (at_end or token_id in stops):
                reason = FinishReason.STOP if token_id in stops else FinishReason.LENGTH
                ended.append((-cost / length**params.length_penalty, Answer(output, reason, -cost)))
        ended = sorted(ended, key=lambda scored: -scored[0])[:width]
        open_beams = next_beams[:width]
        if at_end or not open_beams or _is_over(request, width, max_output, open_beams[0][0], length, ended):
            return [answer for _, answer in ended]


def _is_over(
    request: Request, width: int, max_output: int, best: float, length: int, ended: list[tuple[float, Answer]]
) -> bool:
    params = request.sampling_params
    if len(ended) < width:
        return False
    if params.early_stopping is True:
        return True
    longest = params.early_stopping == "never" and params.length_penalty > 0
    return bool(best / (max_output if longest else length) ** params.length_penalty <= ended[-1][0])
