"""What holds for all tests."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a GPU where there is none, and slow ones unless -m asks for them."""
    left_out = set() if torch.cuda.is_available() else {"gpu"}
    if "slow" not in config.option.markexpr:
        left_out.add("slow")

    def is_kept(item: pytest.Item) -> bool:
        return all(item.get_closest_marker(name) is None for name in left_out)

    config.hook.pytest_deselected(items=[item for item in items if not is_kept(item)])
    items[:] = [item for item in items if is_kept(item)]
