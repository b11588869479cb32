"""What the engine hands back, one message per sequence and step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pagedcore.engine.logprobs import PromptLogprobs, TokenLogprobs
from pagedcore.engine.queue_limits import RefusalReason
from pagedcore.engine.sequence import FinishReason, Sequence
from pagedcore.engine.sequence_group import SequenceGroup


@dataclass(slots=True)
class TokenOutput:
    """New tokens of one sequence of a request, in order; the last message of a sequence has a finish reason.

    `index` is the sequence's among the request's outputs, 0 to n - 1. The last message of the request has `request_finished`.
    Where outputs are ranked (beam search, best_of above n), there is one message for each, with all its tokens, best first.
    An abort or an error ends the whole request with one message, of index 0.
    `stop_reason` is the stop token id that ended the sequence, when that is not the end-of-sequence token.
    `logprobs` has one entry per token, when the request asked for them. `cumulative_logprob`, in the last message of a
    sequence, is the sum over all its tokens, where it is known: then, and where outputs are ranked.
    `prompt_logprobs` is in the first message of a request that asked for them, whichever sequence that is of; not where the
    request was ended before its prompt had been computed.
    `error` is set exactly when the reason is ERROR.
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    error: Exception | None = None
    request_finished: bool = False
    cumulative_logprob: float | None = None
    prompt_logprobs: PromptLogprobs | None = None


class OutputSink(Protocol):
    """Where a request's outputs go.

    Called on the engine's thread, at a deadline on the timer's, and at the engine's end on the one that ends it; never on two
    at once. Must return at once.
    """

    def push(self, output: TokenOutput) -> None: ...


def final_output(
    sequence: Sequence, token_ids: list[int], logprobs: list[TokenLogprobs], *, request_finished: bool, index: int = -1
) -> TokenOutput:
    """The last message of a sequence that has ended, with `token_ids` not told before; `index`: the sequence's, if not given."""
    group, params = sequence.group, sequence.request.sampling_params
    last_token = sequence.token_ids[-1]
    by_token = sequence.finish_reason is FinishReason.STOP and last_token in params.stop_token_ids and token_ids
    return TokenOutput(
        group.request_id,
        sequence.index if index < 0 else index,
        token_ids,
        sequence.finish_reason,
        stop_reason=last_token if by_token else None,
        logprobs=logprobs if params.logprobs is not None else None,
        num_cached_tokens=group.num_cached_tokens,
        request_finished=request_finished,
        cumulative_logprob=sequence.cumulative_logprob if group.num_logprobs >= 0 else None,
    )


def ranked_outputs(group: SequenceGroup) -> list[TokenOutput]:
    """The outputs of a group that has ended: the n of largest cumulative log probability, or the n best beams, best first."""
    if group.search is not None:
        return [
            TokenOutput(
                group.request_id,
                index,
                beam.token_ids,
                beam.reason,
                stop_reason=beam.stop_reason,
                num_cached_tokens=group.num_cached_tokens,
                request_finished=index + 1 == group.num_outputs,
                cumulative_logprob=beam.logprob,
            )
            for index, beam in enumerate(group.search.ended[: group.num_outputs])
        ]
    best = sorted(group.held, key=lambda seq: (-seq.cumulative_logprob, seq.index))[: group.num_outputs]
    return [
        final_output(seq, seq.output_token_ids, seq.logprobs, index=index, request_finished=index + 1 == len(best))
        for index, seq in enumerate(best)
    ]


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine between two steps; `*_total` only ever grow. Running, waiting, preempted,
    finished: requests.

    `refused_total`: requests that were not taken, by reason. `expired_total`: requests that ended at their deadline.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_preempted: int = 0
    num_swapped: int = 0  # of the preempted ones
    block_size: int = 0  # tokens
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_pinned_blocks: int = 0
    num_host_blocks: int = 0
    num_free_host_blocks: int = 0
    prefix_cache_queries_total: int = 0  # tokens
    prefix_cache_hits_total: int = 0  # tokens
    prefix_cache_evictions_total: int = 0  # blocks
    preemptions_total: int = 0
    swapped_out_blocks_total: int = 0
    swapped_in_blocks_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    steps_total: int = 0
    refused_total: Mapping[RefusalReason, int] = field(default_factory=dict)
    expired_total: int = 0
    finished_total: Mapping[FinishReason, int] = field(default_factory=dict)
