"""CpuGraph: captured calls do not run, a replay runs them in order on what the memory holds then."""

from __future__ import annotations

import threading

import pytest
import torch

from pagedcore import ops


def test_replay_runs_the_captured_calls_in_order_on_current_contents() -> None:
    x, half = torch.zeros(3, 32), torch.full((3, 16), -7.0)
    weight, out = torch.ones(16), torch.full((3, 16), -7.0)
    graph = ops.CpuGraph()
    with graph.capture():
        ops.silu_and_mul(x, half)
        ops.rms_norm(half, weight, 1e-6, None, out)
    assert (half == -7.0).all()
    assert (out == -7.0).all()
    for seed in range(2):
        x.copy_(torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(half, ops.silu_and_mul(x))
        assert torch.equal(out, ops.rms_norm(half, weight, 1e-6))


def test_capture_ends_with_its_block_and_concerns_its_thread_only() -> None:
    x = torch.randn(2, 8)
    graph = ops.CpuGraph()
    elsewhere: list[torch.Tensor] = []
    with pytest.raises(RuntimeError, match="inside"), graph.capture():
        thread = threading.Thread(target=lambda: elsewhere.append(ops.silu_and_mul(x)))
        thread.start()
        thread.join()
        raise RuntimeError("inside")
    expected = torch.nn.functional.silu(x[:, :4]) * x[:, 4:]
    torch.testing.assert_close(elsewhere[0], expected)
    torch.testing.assert_close(ops.silu_and_mul(x), expected)
