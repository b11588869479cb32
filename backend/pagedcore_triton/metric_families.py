"""What the metrics endpoint shows: every family, its help text, its buckets and where its values come from.

Families named `vllm:` have the names, labels and buckets of vllm_backend and, where that has none, of vLLM;
`nv_trt_llm_kv_cache_block_metrics` is what Triton makes its load header for load balancers from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pagedcore.engine.outputs import EngineStats
from pagedcore.engine.queue_limits import RefusalReason
from pagedcore.engine.sequence import FinishReason
from pagedcore.engine.telemetry import Records, RequestRecord
from pagedcore_triton.allowance import Observation

TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TOKEN_TIME_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
E2E_BUCKETS = (1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
PHASE_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
STEP_TOKEN_BUCKETS = tuple(float(number) for number in (1, *(2**power for power in range(3, 15))))
COUNT_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
CANCEL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

INTERNAL = "internal"  # beside the engine's reasons to refuse a request: it failed before it reached the engine
REFUSAL_REASONS = (*(reason.value for reason in RefusalReason), INTERNAL)


@dataclass(frozen=True)
class Snapshot:
    """The state to export: the engine's, requests refused by it or before it, by reason, and what was not observed."""

    engine: EngineStats
    refused: dict[str, int]
    num_dropped: int


@dataclass(frozen=True)
class Scalar:
    """One line of a gauge's or a counter's family. Families of several lines have a label to tell them apart."""

    name: str
    description: str
    value: Callable[[Snapshot], float]
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """A family of observations, which `values` finds in the records; the last bucket, of everything, is Triton's to add."""

    name: str
    description: str
    buckets: tuple[float, ...]
    values: Callable[[Records], Iterable[Observation]]


def gauges() -> list[Scalar]:
    """The state of the engine now."""
    return [
        Scalar("vllm:num_requests_running", "Number of requests being computed.", lambda now: now.engine.num_running),
        Scalar(
            "vllm:num_requests_waiting",
            "Number of requests waiting to be computed, those that were preempted among them.",
            lambda now: now.engine.num_waiting + now.engine.num_preempted,
        ),
        Scalar(
            "pagedcore:num_tokens_waiting",
            "Number of prompt tokens of the requests that have not begun.",
            lambda now: now.engine.num_waiting_tokens,
        ),
        Scalar("vllm:kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.", _usage),
        Scalar(
            "vllm:gpu_cache_usage_perc", "Share of the KV blocks in use; 1 is all (the name until vLLM 0.9).", _usage
        ),
        Scalar(
            "pagedcore:kv_blocks_free",
            "Number of KV blocks that are free or evictable.",
            lambda now: now.engine.num_free_blocks,
        ),
        Scalar("pagedcore:kv_blocks_total", "Number of KV blocks.", lambda now: now.engine.num_blocks),
        Scalar(
            "pagedcore:kv_blocks_cached",
            "Number of KV blocks that the prefix cache can find.",
            lambda now: now.engine.num_cached_blocks,
        ),
        Scalar(
            "pagedcore:kv_blocks_pinned",
            "Number of KV blocks that hold the pinned prefixes and are never free.",
            lambda now: now.engine.num_pinned_blocks,
        ),
        Scalar(
            "vllm:num_requests_swapped",
            "Number of the waiting requests whose KV blocks are in host memory.",
            lambda now: now.engine.num_swapped,
        ),
        Scalar("vllm:cpu_cache_usage_perc", "Share of the swap space's KV blocks in use; 1 is all.", _host_usage),
        *_trt_llm_gauges(),
    ]


def counters() -> list[Scalar]:
    """What has happened since the model was loaded."""
    return [
        Scalar(
            "vllm:prompt_tokens_total",
            "Number of prefill tokens processed.",
            lambda now: now.engine.prompt_tokens_total,
        ),
        Scalar(
            "vllm:generation_tokens_total",
            "Number of generation tokens processed.",
            lambda now: now.engine.generation_tokens_total,
        ),
        Scalar(
            "vllm:prefix_cache_queries_total",
            "Number of prompt tokens looked up in the prefix cache.",
            lambda now: now.engine.prefix_cache_queries_total,
        ),
        Scalar(
            "vllm:prefix_cache_hits_total",
            "Number of prompt tokens found in the prefix cache.",
            lambda now: now.engine.prefix_cache_hits_total,
        ),
        Scalar(
            "vllm:num_preemptions_total",
            "Cumulative number of preemptions.",
            lambda now: now.engine.preemptions_total,
        ),
        Scalar(
            "pagedcore:prefix_cache_evictions_total",
            "Number of KV blocks that the prefix cache gave up because their place was needed.",
            lambda now: now.engine.prefix_cache_evictions_total,
        ),
        Scalar(
            "pagedcore:swapped_blocks_total",
            "Number of KV blocks copied between device and host memory.",
            lambda now: now.engine.swapped_out_blocks_total,
            {"direction": "out"},
        ),
        Scalar(
            "pagedcore:swapped_blocks_total",
            "Number of KV blocks copied between device and host memory.",
            lambda now: now.engine.swapped_in_blocks_total,
            {"direction": "in"},
        ),
        Scalar("pagedcore:engine_steps_total", "Number of steps.", lambda now: now.engine.steps_total),
        *(_finished_counter(reason) for reason in FinishReason),
        *(_refused_counter(reason) for reason in REFUSAL_REASONS),
        Scalar(
            "pagedcore:requests_expired_total",
            "Count of requests that ended at their deadline.",
            lambda now: now.engine.expired_total,
        ),
        Scalar(
            "pagedcore:observations_dropped_total",
            "Observations left out of the histograms to bound what they cost.",
            lambda now: now.num_dropped,
        ),
    ]


def histograms(max_model_len: int) -> list[Histogram]:
    """What steps and requests were like."""
    return [*_step_histograms(), *_request_times(), *_request_shapes(one_two_five(max_model_len))]


def one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 and so on, up to `limit`."""
    values = (digit * 10**power for power in range(len(str(limit))) for digit in (1, 2, 5))
    return tuple(float(value) for value in values if value <= limit)


def _step_histograms() -> list[Histogram]:
    """Told as it happens, also of requests that do not complete."""
    return [
        Histogram(
            "vllm:time_to_first_token_seconds",
            "Histogram of time to first token in seconds.",
            TTFT_BUCKETS,
            lambda records: _once(time for step in records.steps for time in step.times_to_first_token),
        ),
        Histogram(
            "vllm:time_per_output_token_seconds",
            "Histogram of time per output token in seconds.",
            TOKEN_TIME_BUCKETS,
            _token_intervals,
        ),
        Histogram(
            "vllm:inter_token_latency_seconds",
            "Histogram of time between two tokens of a sequence in seconds.",
            TOKEN_TIME_BUCKETS,
            _token_intervals,
        ),
        Histogram(
            "vllm:iteration_tokens_total",
            "Histogram of number of tokens per engine_step.",
            STEP_TOKEN_BUCKETS,
            lambda records: _once(step.num_tokens for step in records.steps),
        ),
        Histogram(
            "pagedcore:cancel_to_free_seconds",
            "Histogram of time from noticing a cancellation to the request's KV blocks being free, in seconds.",
            CANCEL_BUCKETS,
            lambda records: _once(records.cancel_seconds),
        ),
    ]


def _request_shapes(token_counts: tuple[float, ...]) -> list[Histogram]:
    """What completed requests asked for and got."""
    return [
        Histogram(
            "vllm:request_prompt_tokens",
            "Number of prefill tokens processed.",
            token_counts,
            lambda records: _once(request.num_prompt_tokens for request in _completed(records)),
        ),
        Histogram(
            "vllm:request_generation_tokens",
            "Number of generation tokens processed.",
            token_counts,
            lambda records: _once(request.num_generation_tokens for request in _completed(records)),
        ),
        Histogram(
            "vllm:request_params_max_tokens",
            "Histogram of the max_tokens request parameter.",
            token_counts,
            lambda records: _once(request.max_tokens for request in _completed(records) if request.max_tokens),
        ),
        Histogram(
            "vllm:request_params_n",
            "Histogram of the n request parameter.",
            COUNT_BUCKETS,
            lambda records: _once(request.n for request in _completed(records)),
        ),
        Histogram(
            "vllm:request_params_best_of",
            "Histogram of the best_of request parameter.",
            COUNT_BUCKETS,
            lambda records: _once(request.best_of for request in _completed(records)),
        ),
    ]


def _request_times() -> list[Histogram]:
    """How long the phases of a completed request took."""
    return [
        Histogram(
            "vllm:e2e_request_latency_seconds",
            "Histogram of end to end request latency in seconds.",
            E2E_BUCKETS,
            lambda records: _once(request.ended_at - request.arrived_at for request in _completed(records)),
        ),
        Histogram(
            "vllm:request_queue_time_seconds",
            "Histogram of time spent in WAITING phase for request.",
            PHASE_BUCKETS,
            lambda records: _spans((request.arrived_at, request.scheduled_at) for request in _completed(records)),
        ),
        Histogram(
            "vllm:request_prefill_time_seconds",
            "Histogram of time spent in PREFILL phase for request.",
            PHASE_BUCKETS,
            lambda records: _spans((request.scheduled_at, request.first_token_at) for request in _completed(records)),
        ),
        Histogram(
            "vllm:request_decode_time_seconds",
            "Histogram of time spent in DECODE phase for request.",
            PHASE_BUCKETS,
            lambda records: _spans((request.first_token_at, request.last_token_at) for request in _completed(records)),
        ),
        Histogram(
            "vllm:request_inference_time_seconds",
            "Histogram of time spent in RUNNING phase for request.",
            PHASE_BUCKETS,
            lambda records: _spans((request.scheduled_at, request.last_token_at) for request in _completed(records)),
        ),
    ]


def _trt_llm_gauges() -> list[Scalar]:
    values: dict[str, Callable[[Snapshot], float]] = {
        "fraction": _usage,
        "tokens_per": lambda now: now.engine.block_size,
        "used": lambda now: now.engine.num_blocks - now.engine.num_free_blocks,
        "free": lambda now: now.engine.num_free_blocks,
        "max": lambda now: now.engine.num_blocks,
    }
    description = "KV cache blocks, as TensorRT-LLM's backend counts them."
    return [
        Scalar("nv_trt_llm_kv_cache_block_metrics", description, value, {"kv_cache_block_type": kind})
        for kind, value in values.items()
    ]


def _finished_counter(reason: FinishReason) -> Scalar:
    return Scalar(
        "vllm:request_success_total",
        "Count of processed requests, by what ended them.",
        lambda now: now.engine.finished_total.get(reason, 0),
        {"finished_reason": reason.value},
    )


def _refused_counter(reason: str) -> Scalar:
    return Scalar(
        "pagedcore:requests_refused_total",
        "Count of requests that were answered with an error at once.",
        lambda now: now.refused[reason],
        {"reason": reason},
    )


def _usage(now: Snapshot) -> float:
    return 1 - now.engine.num_free_blocks / now.engine.num_blocks


def _host_usage(now: Snapshot) -> float:
    used = now.engine.num_host_blocks - now.engine.num_free_host_blocks
    return used / max(1, now.engine.num_host_blocks)


def _token_intervals(records: Records) -> Iterator[Observation]:
    return (interval for step in records.steps for interval in step.token_intervals)


def _completed(records: Records) -> Iterator[RequestRecord]:
    """The requests that were not aborted and did not fail: how long those took says nothing about the server."""
    return (
        request for request in records.requests if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    )


def _once(values: Iterable[float]) -> Iterator[Observation]:
    return ((value, 1) for value in values)


def _spans(times: Iterable[tuple[float | None, float | None]]) -> Iterator[Observation]:
    """The seconds from the first to the second of each pair that has both."""
    return ((end - begin, 1) for begin, end in times if begin is not None and end is not None)
