"""A model split over ranks computes what the whole one does: two ranks on two threads, sums through a barrier."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pagedcore.errors import ConfigError
from pagedcore.layers.linear import Placement, RowLinear
from tests.models import tiny
from tests.reference.paged import PagedModel

PROMPT = [3, 77, 12, 9, 120, 64, 1]
DEVICE = torch.device("cpu")


class Meeting:
    """Where the threads of all ranks exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadRank:
    """One rank of a group whose ranks are threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.rank = rank
        self.size = len(meeting.tensors)

    def all_reduce(self, x: torch.Tensor) -> None:
        x.copy_(torch.stack(self._exchange(x)).sum(dim=0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim=1)

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.meeting.tensors[self.rank] = x.clone()
        self.meeting.barrier.wait()
        tensors = list(self.meeting.tensors)
        self.meeting.barrier.wait()
        return tensors


@pytest.mark.parametrize("variant", ["llama-biases", "llama-tied", "qwen2", "qwen3", "opt", "opt-350m"])
def test_two_ranks_equal_one(variant: str, tmp_path: Path) -> None:
    tiny.make(variant, tmp_path, vocab_size=132)
    whole = PagedModel(tmp_path, torch.float32)
    expected = whole.logits([whole.add(PROMPT)], [len(PROMPT)])
    meeting = Meeting(2)

    def run(rank: int) -> torch.Tensor:
        model = PagedModel(tmp_path, torch.float32, group=ThreadRank(meeting, rank))
        row = model.add(PROMPT)
        model.logits([row], [4])
        return model.logits([row], [3])

    with ThreadPoolExecutor(2) as pool:
        for logits in pool.map(run, range(2)):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_what_cannot_be_split_is_refused() -> None:
    placement = Placement(torch.float32, DEVICE, ThreadRank(Meeting(3), 0))
    with pytest.raises(ConfigError, match="in_features must be a multiple of tensor_parallel_size 3, got 64"):
        RowLinear(64, 64, False, placement)
