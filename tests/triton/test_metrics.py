"""The metrics endpoint of a real tritonserver: what is shown, that the numbers are right, and that it can be switched off."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from pagedcore_triton.allowance import Allowance
from pagedcore_triton.metric_families import Snapshot, gauges

from pagedcore.engine.outputs import EngineStats
from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import generate, generate_grpc, grpc_stream, metrics_text, wait_until
from tests.triton.repository import ENGINE_ARGUMENTS
from tests.triton.samples import OWN_LABELS, Growth, parse

_POWERS = [digit * 10**power for power in range(4) for digit in (1, 2, 5)]
TOKEN_COUNTS = [value for value in _POWERS if value <= ENGINE_ARGUMENTS["max_model_len"]]
# Families of vllm_backend: kind, help text, buckets.
UPSTREAM: dict[str, tuple[str, str, list[float]]] = {
    "vllm:prompt_tokens_total": ("counter", "Number of prefill tokens processed.", []),
    "vllm:generation_tokens_total": ("counter", "Number of generation tokens processed.", []),
    "vllm:time_to_first_token_seconds": (
        "histogram",
        "Histogram of time to first token in seconds.",
        [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10],
    ),
    "vllm:time_per_output_token_seconds": (
        "histogram",
        "Histogram of time per output token in seconds.",
        [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5],
    ),
    "vllm:e2e_request_latency_seconds": (
        "histogram",
        "Histogram of end to end request latency in seconds.",
        [1, 2.5, 5, 10, 15, 20, 30, 40, 50, 60],
    ),
    "vllm:request_prompt_tokens": ("histogram", "Number of prefill tokens processed.", TOKEN_COUNTS),
    "vllm:request_generation_tokens": ("histogram", "Number of generation tokens processed.", TOKEN_COUNTS),
    "vllm:request_params_n": ("histogram", "Histogram of the n request parameter.", [1, 2, 5, 10, 20]),
}
ASKED_FOR = {
    "gauge": "vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc vllm:gpu_cache_usage_perc "
    "nv_trt_llm_kv_cache_block_metrics vllm:num_requests_swapped "
    "vllm:cpu_cache_usage_perc pagedcore:kv_blocks_total pagedcore:kv_blocks_free pagedcore:kv_blocks_cached "
    "pagedcore:kv_blocks_pinned",
    "counter": "vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total vllm:num_preemptions_total "
    "vllm:request_success_total pagedcore:requests_refused_total pagedcore:requests_expired_total pagedcore:engine_steps_total "
    "pagedcore:prefix_cache_evictions_total pagedcore:swapped_blocks_total "
    "pagedcore:observations_dropped_total",
    "histogram": "vllm:inter_token_latency_seconds vllm:iteration_tokens_total vllm:request_queue_time_seconds "
    "vllm:request_prefill_time_seconds vllm:request_decode_time_seconds vllm:request_inference_time_seconds "
    "vllm:request_params_best_of vllm:request_params_max_tokens pagedcore:cancel_to_free_seconds",
}


def inputs(prompt: str, stream: bool = True, **sampling: Any) -> dict[str, Any]:
    parameters = {"temperature": 0, "ignore_eos": True, **sampling}
    return {"text_input": prompt, "stream": stream, "sampling_parameters": json.dumps(parameters)}


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_family_of_vllm_backend(server: TritonServer, name: str) -> None:
    kind, description, buckets = UPSTREAM[name]
    text = metrics_text(server.metrics_url)
    assert f"# HELP {name} {description}\n# TYPE {name} {kind}\n" in text
    edges = [dict(labels)["le"] for family, labels in parse(text) if family == f"{name}_bucket"]
    assert sorted(map(float, edges)) == [*buckets, *([float("inf")] if buckets else [])]


def test_the_families_that_were_asked_for(server: TritonServer) -> None:
    text = metrics_text(server.metrics_url)
    for kind, names in ASKED_FOR.items():
        for name in names.split():
            assert f"\n# TYPE {name} {kind}\n" in text
    ours = [key for key in parse(text) if not re.match("nv_(?!trt_llm)", key[0])]
    assert len(ours) > 100
    assert all(labels >= OWN_LABELS for _, labels in ours)


def test_numbers_of_requests_that_complete(server: TritonServer, all_blocks_free: Callable[[], bool]) -> None:
    """Counts are those that vllm_backend's own test expects: a time for every token but each request's first."""
    growth = Growth(server)
    prompt = "Colour, number and the seven seas: " * 8
    for stream, max_tokens in ((True, 5), (False, 9), (True, 1)):
        generate_grpc(server.grpc_url, inputs(prompt, stream, max_tokens=max_tokens))
    growth.wait_for("vllm:request_generation_tokens_count", 3)
    growth.wait_for("vllm:request_generation_tokens_sum", 15)
    growth.wait_for("vllm:generation_tokens_total", 15)
    growth.wait_for("vllm:time_per_output_token_seconds_count", 12)
    growth.wait_for("vllm:inter_token_latency_seconds_count", 12)
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_params_n"):
        growth.wait_for(f"vllm:{name}_count", 3)
    growth.wait_for("vllm:request_success_total", 3, finished_reason="length")
    growth.wait_for("vllm:request_params_max_tokens_sum", 15)
    num_prompt_tokens = growth.of("vllm:prompt_tokens_total") / 3
    assert num_prompt_tokens > 3 * 16
    growth.wait_for("vllm:request_prompt_tokens_sum", 3 * num_prompt_tokens)
    growth.wait_for("vllm:prefix_cache_queries_total", 3 * num_prompt_tokens)
    hits = growth.of("vllm:prefix_cache_hits_total")
    assert hits == 2 * ((num_prompt_tokens - 1) // 16) * 16
    # What was computed: prompts less what was cached, and every drawn token but the last of a request, which no step reads.
    # A step that was under way when a request ended may have computed one token more.
    needed = 3 * num_prompt_tokens - hits + 15 - 3
    wait_until(lambda: growth.of("vllm:iteration_tokens_total_sum") >= needed)
    # Counters are exported after histograms, and so may be a step ahead until the next time.
    wait_until(lambda: growth.of("vllm:iteration_tokens_total_count") == growth.of("pagedcore:engine_steps_total"))
    assert growth.of("vllm:iteration_tokens_total_sum") <= needed + 3
    assert growth.of("pagedcore:observations_dropped_total") == 0


def test_a_stop_string_is_a_stop(server: TritonServer, all_blocks_free: Callable[[], bool]) -> None:
    growth = Growth(server)
    answer = generate_grpc(server.grpc_url, inputs("Count: one, two, three, four,", max_tokens=200, stop=["e"]))
    assert "e" not in answer.text
    growth.wait_for("vllm:request_success_total", 1, finished_reason="stop")
    growth.wait_for("vllm:e2e_request_latency_seconds_count", 1)
    assert growth.of("pagedcore:cancel_to_free_seconds_count") == 0


def test_phases_of_a_request_add_up(server: TritonServer, all_blocks_free: Callable[[], bool]) -> None:
    growth = Growth(server)
    generate_grpc(server.grpc_url, inputs("Once upon a time", max_tokens=8))
    growth.wait_for("vllm:request_params_best_of_count", 1)
    growth.wait_for("vllm:time_per_output_token_seconds_count", 7)  # of steps, which are recorded after their requests
    sums = {
        phase: growth.of(f"vllm:request_{phase}_time_seconds_sum")
        for phase in ("queue", "prefill", "decode", "inference")
    }
    assert all(seconds > 0 for seconds in sums.values())
    assert sums["prefill"] + sums["decode"] == pytest.approx(sums["inference"], abs=1e-6)
    first = growth.of("vllm:time_to_first_token_seconds_sum")
    assert sums["queue"] + sums["prefill"] == pytest.approx(first, abs=1e-6)
    assert first + sums["decode"] <= growth.of("vllm:e2e_request_latency_seconds_sum") + 1e-6
    assert growth.of("vllm:time_per_output_token_seconds_sum") == pytest.approx(sums["decode"], abs=1e-6)


def test_requests_that_do_not_complete(server: TritonServer, all_blocks_free: Callable[[], bool]) -> None:
    growth = Growth(server)
    assert generate(server.http_url, inputs("Once", False, temperature=-1)).error is not None
    growth.wait_for("pagedcore:requests_refused_total", 1, reason="invalid")
    assert generate(server.http_url, inputs("word " * 2000, False, max_tokens=1)).error is not None
    growth.wait_for("pagedcore:requests_refused_total", 2, reason="invalid")
    with grpc_stream(server.grpc_url) as stream:
        stream.send(inputs("Once upon a time", max_tokens=900))
        stream.next()
        wait_until(lambda: 0 < _block_gauge(server, "used") < 100)
        stream.cancel()
    growth.wait_for("vllm:request_success_total", 1, finished_reason="abort")
    growth.wait_for("pagedcore:cancel_to_free_seconds_count", 1)
    assert 0 < growth.of("pagedcore:cancel_to_free_seconds_sum") < 60
    assert growth.of("vllm:e2e_request_latency_seconds_count") == 0


def test_block_gauges_of_the_load_header(server: TritonServer, all_blocks_free: Callable[[], bool]) -> None:
    idle = {"tokens_per": 16, "used": 0, "max": 2048, "free": 2048, "fraction": 0}
    wait_until(lambda: {kind: _block_gauge(server, kind) for kind in idle} == idle)


def _block_gauge(server: TritonServer, kind: str) -> float:
    labels = OWN_LABELS | {("kv_cache_block_type", kind)}
    return parse(metrics_text(server.metrics_url))["nv_trt_llm_kv_cache_block_metrics", labels]


def test_pinned_blocks_are_shown_beside_the_others() -> None:
    stats = EngineStats(num_blocks=10, num_free_blocks=6, num_cached_blocks=5, num_pinned_blocks=3)
    shown = {gauge.name: gauge.value(Snapshot(stats, {}, 0)) for gauge in gauges() if ":kv_blocks_" in gauge.name}
    assert {name.rpartition("_")[2]: value for name, value in shown.items()} == {
        "total": 10,
        "free": 6,
        "cached": 5,
        "pinned": 3,
    }


def test_observations_above_the_allowance_are_sampled_evenly() -> None:
    allowance = Allowance(rate=100, burst=50)
    assert allowance.choose([(1.0, 30), (2.0, 20)], seconds=0.0) == [1.0] * 30 + [2.0] * 20
    chosen: list[float] = []
    for _ in range(100):  # of 400 observations a second each, 70 % of them short
        chosen += allowance.choose([(0.01, 28), (0.09, 12)], seconds=0.1)
    assert len(chosen) == 1000
    assert chosen.count(0.01) == pytest.approx(700, abs=2)
    assert allowance.num_dropped == 3000
    assert len(allowance.choose([(0.5, 40)], seconds=10.0)) == 40
