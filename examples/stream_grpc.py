"""Stream the answers to several prompts at once over one gRPC connection.

Usage: .venv/bin/python examples/stream_grpc.py [--url localhost:8001] [--max-tokens 64] [prompt ...]
"""

from __future__ import annotations

import argparse
import json
import queue
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient

MODEL = "llm"
PROMPTS = ["The capital of France is", "Once upon a time", "Water boils at"]


def text_tensor(name: str, value: str) -> grpcclient.InferInput:
    tensor = grpcclient.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode()], dtype=np.object_))
    return tensor


def bool_tensor(name: str, value: bool) -> grpcclient.InferInput:
    tensor = grpcclient.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([value]))
    return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    sampling = json.dumps({"max_tokens": options.max_tokens, "temperature": 0})

    responses: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
    client = grpcclient.InferenceServerClient(options.url)
    client.start_stream(lambda result, error: responses.put((result, error)))
    for number, prompt in enumerate(options.prompts):
        inputs = [
            text_tensor("text_input", prompt),
            bool_tensor("stream", True),
            text_tensor("sampling_parameters", sampling),
        ]
        client.async_stream_infer(MODEL, inputs, request_id=str(number))

    unfinished = set(range(len(options.prompts)))
    texts = list(options.prompts)
    while unfinished:
        result, error = responses.get()
        if error is not None:
            raise SystemExit(f"error: {error}")
        response = result.get_response()
        number = int(response.id)
        delta = result.as_numpy("text_output")[0].decode()
        texts[number] += delta
        print(f"[{number}] {delta!r}", flush=True)
        # The response with the last token says so itself; leaving early instead would cancel the request.
        if response.parameters["triton_final_response"].bool_param:
            unfinished.remove(number)
    client.stop_stream()
    for text in texts:
        print(f"\n{text}")


if __name__ == "__main__":
    main()
