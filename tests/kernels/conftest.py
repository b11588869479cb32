"""Fixtures of the CPU kernel tests: every instruction set this machine has, and a thread count that is put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pagedcore import _kernels, ops

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_bf16")
AVAILABLE = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(ops.instruction_set()) + 1]


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The references are small: torch's threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=AVAILABLE)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on each variant that this processor can run."""
    _kernels.cpu.set_isa_for_testing(request.param)
    yield request.param
    _kernels.cpu.set_isa_for_testing(AVAILABLE[-1])


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = ops.num_threads()
    yield
    ops.set_num_threads(before)
