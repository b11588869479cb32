"""Runs of requests with one sequence or several, and what they must come to."""

from __future__ import annotations

import itertools
import random
from typing import Any

from pagedcore._core import BlockManager
from pagedcore.engine.engine import Engine
from pagedcore.engine.outputs import TokenOutput
from pagedcore.engine.request import Request
from pagedcore.engine.sampling_extras import pack_sampling_row
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.seeds import mix_seed
from pagedcore.engine.sequence import FinishReason
from tests.engine.test_schedule_invariance import EOS, MAX_MODEL_LEN, VOCAB, make_engine
from tests.reference.fake_model import reference_logprob, reference_tokens

Outputs = dict[tuple[str, int], list[int]]
# (num_blocks, block_size, max_num_batched_tokens, max_num_seqs): pools that the largest mixed request just fits.
TIGHT = [(40, 4, 24, 24), (38, 4, 13, 13), (140, 1, 32, 16), (14, 16, 24, 16), (21, 8, 64, 24)]


def make_mixed_requests(seed: int, count: int, width: int = 4) -> list[Request]:
    """Greedy and seeded, one sequence and several, all output or the best of them, and beams; some prompts begin alike."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(20)]
    requests = []
    for number in range(count):
        prompt = shared[: rng.choice((0, 0, 7, 16, 20))] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 24))]
        n = rng.choice((1, 1, 2, 3, width))
        common: dict[str, Any] = {"seed": number, "max_tokens": rng.randint(1, 24), "ignore_eos": rng.random() < 0.5}
        kinds: list[dict[str, Any]] = [
            {"n": n, "temperature": 0},
            {"n": n, "temperature": 0.8},
            {"n": n, "best_of": min(n + 1, width), "temperature": 0.8},
            {"n": min(n, 2), "beam_width": rng.randint(2, width), "temperature": 0, "early_stopping": n == 1},
        ]
        requests.append(Request(f"r{number}", prompt, SamplingParams(**common, **rng.choice(kinds))))
    return requests


def expected_outputs(requests: list[Request]) -> Outputs:
    """Every sequence drawn by itself, every beam search run by itself (tests/models/test_beam_search.py says that it is right)."""
    outputs: Outputs = {}
    for request in requests:
        if request.sampling_params.use_beam_search:
            alone = start(num_blocks=300, enable_prefix_caching=False, one_step_ahead=False, max_num_batched_tokens=200)
            alone.add(request)
            outputs |= alone.to_the_end()
            continue
        params, prompt = request.sampling_params, request.prompt_token_ids
        assert params.seed is not None and params.max_tokens is not None
        samples = []
        for index in range(params.num_sequences):
            seed = params.seed if index == 0 else mix_seed(params.seed, index)
            stops = frozenset() if params.ignore_eos else frozenset({EOS})
            limit = min(params.max_tokens, MAX_MODEL_LEN - len(prompt))
            sampling = pack_sampling_row(params, seed).tolist()
            samples.append(reference_tokens(prompt, limit, VOCAB, stops, sampling))
        if params.ranks_outputs:
            samples.sort(key=lambda tokens: -reference_logprob(prompt, tokens, VOCAB))
        outputs |= {(request.request_id, index): tokens for index, tokens in enumerate(samples[: params.n])}
    return outputs


class Run:
    """Steps an engine to the end of its requests and checks what every run must keep to."""

    def __init__(self, engine: Engine, blocks: BlockManager) -> None:
        self.engine, self.blocks = engine, blocks
        self.outputs: Outputs = {}
        self.messages: dict[str, list[TokenOutput]] = {}

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.engine.add_request(request)
            self.messages[request.request_id] = []

    def take(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            earlier = self.messages[output.request_id]
            assert not earlier or not earlier[-1].request_finished, "nothing is heard of a request after its end"
            ended = {message.index for message in earlier if message.finish_reason is not None}
            whole = output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
            assert whole or output.index not in ended, "nothing is heard of a sequence after its end"
            earlier.append(output)
            self.outputs.setdefault((output.request_id, output.index), []).extend(output.token_ids)

    def to_the_end(self, arrivals: dict[int, list[Request]] | None = None) -> Outputs:
        left = dict(arrivals or {})
        for step in itertools.count():
            self.add(*left.pop(step, []))
            if not left and not self.engine.has_work():
                break
            self.take(self.engine.step())
            self.blocks.check_integrity()
            assert step < 20_000, "the engine makes no progress"
        assert all(messages[-1].request_finished for messages in self.messages.values())
        assert self.blocks.num_free_blocks == self.blocks.num_blocks, "every block is back in the pool"
        assert self.blocks.num_free_host_blocks == self.blocks.num_host_blocks
        return self.outputs


def start(**arguments: Any) -> Run:
    engine, _, blocks = make_engine(**arguments)
    return Run(engine, blocks)
