"""The examples run as they are."""

from __future__ import annotations

import json
import subprocess
import sys

from pagedcore.serve.triton_server import TritonServer
from tests.triton.clients import generate
from tests.triton.repository import ROOT

PROMPT = "Once upon a time"


def test_stream_grpc(server: TritonServer) -> None:
    command = [sys.executable, str(ROOT / "examples" / "stream_grpc.py"), "--url", server.grpc_url, "--max-tokens", "8"]
    result = subprocess.run([*command, PROMPT, "One, two"], check=True, capture_output=True, text=True, timeout=60)
    expected = generate(server.http_url, {"text_input": PROMPT, "max_tokens": 8, "temperature": 0}).text
    assert expected in result.stdout
    assert result.stdout.count("[1] ") == 8


def test_stream_http(server: TritonServer) -> None:
    command = [str(ROOT / "examples" / "stream_http.sh"), PROMPT, server.http_url]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    whole = json.loads(lines[1])["text_output"]
    pieces = [json.loads(line.removeprefix("data: "))["text_output"] for line in lines if line.startswith("data: ")]
    assert len(pieces) == 32
    assert PROMPT + "".join(pieces) == whole
