"""Many streams at once: all finish, and each has the text it has alone."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import generate_grpc, grpc_stream

_WORDS = [
    "river",
    "stone",
    "cloud",
    "letter",
    "music",
    "window",
    "garden",
    "number",
    "silver",
    "morning",
    "paper",
    "engine",
]


def test_64_streams_of_mixed_lengths(server: TritonServer, all_blocks_free: Callable[[], bool]) -> None:
    rng = random.Random(7)
    requests: dict[str, dict[str, Any]] = {}
    for seed in range(64):
        prompt = " ".join(rng.choices(_WORDS, k=rng.choice([1, 5, 17, 60, 150])))
        greedy = seed % 4 != 0
        sampling = {
            "max_tokens": rng.randint(1, 24),
            "ignore_eos": True,
            "temperature": 0 if greedy else 0.9,
            "seed": seed,
        }
        requests[str(seed)] = {"text_input": prompt, "stream": True, "sampling_parameters": json.dumps(sampling)}
    texts: dict[str, list[str]] = defaultdict(list)
    with ExitStack() as stack:
        streams = [stack.enter_context(grpc_stream(server.grpc_url)) for _ in range(8)]
        for number, inputs in requests.items():
            streams[int(number) % 8].send(inputs, request_id=number)
        for index, stream in enumerate(streams):
            open_ids = {number for number in requests if int(number) % 8 == index}
            while open_ids:
                number, text, final = stream.next()
                texts[number] += text
                if final:
                    open_ids.remove(number)
    for number, inputs in requests.items():
        assert "".join(texts[number]) == generate_grpc(server.grpc_url, inputs).text, inputs
