"""Log probabilities are the same bits alone, batched, chunked, cached, recomputed, swapped and resumed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagedcore import ops
from tests.exactness import schedules, split_sums
from tests.exactness.schedules import SCHEDULES, WITHOUT_GRAPHS, Positions, Schedule


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def alone(dtype: str) -> Positions:
    return schedules.alone(dtype)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = ops.num_threads()
    yield
    ops.set_num_threads(before)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.is_quick], ids=lambda schedule: schedule.name)
def test_same_bits_under_every_schedule(dtype: str, alone: Positions, schedule: Schedule) -> None:
    assert schedules.num_different(schedules.under(schedule, dtype), alone) == 0


def test_a_kernel_that_splits_sums_for_small_batches_is_seen(dtype: str, alone: Positions) -> None:
    """The inverse control. Only some steps have so few rows."""
    with split_sums.planted():
        different = schedules.num_different(schedules.under(WITHOUT_GRAPHS, dtype), alone)
    assert different > 0
