"""The block manager that most of its tests use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagedcore._core import BlockManager
from tests.core.block_calls import BLOCK_SIZE


@pytest.fixture
def manager() -> Iterator[BlockManager]:
    manager = BlockManager(8, BLOCK_SIZE, num_host_blocks=4)
    yield manager
    manager.check_integrity()
