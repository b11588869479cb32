"""The packed step buffer: every element of it, and what is refused."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from pagedcore._core import BlockManager, copy_tokens
from pagedcore.engine.step_plan import StepLayout
from tests.core.reference_manager import ReferenceRow, reference_step

UNTOUCHED = -77


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("padding", [(0, 0, 0), (5, 9, 2)])
def test_every_element_is_as_the_layout_says(block_size: int, padding: tuple[int, int, int]) -> None:
    random = np.random.default_rng(block_size)
    manager = BlockManager(4000, block_size)
    arguments: dict[str, list[Any]] = {
        name: [] for name in ("seq_ids", "num_computed", "query_lens", "token_ids", "last_rows")
    }
    rows = []
    for seq_id in range(40):
        num_computed, query_len = int(random.integers(0, 60)), int(random.integers(1, 40))
        if seq_id % 2:
            query_len = 1
        if seq_id % 5 == 4:
            query_len = 0
        end = num_computed + query_len
        in_flight = seq_id % 3 == 0
        token_ids = random.integers(0, 2**31 - 1, end - in_flight + 3 * (not in_flight)).tolist()
        manager.add(seq_id)
        manager.grow(seq_id, end + int(random.integers(0, 20)), 0)
        last_row = int(random.integers(0, 4096)) if in_flight else -1
        rows.append(ReferenceRow(manager.block_table(seq_id), num_computed, query_len, token_ids, last_row))
        values = (seq_id, num_computed, query_len, array("i", token_ids), last_row)
        for name, value in zip(arguments, values, strict=True):
            arguments[name].append(value)
    manager.add(1000)
    manager.grow(1000, 1, 0)
    copies = []
    for seq_id in (1001, 1002, 1003):
        manager.fork(1000, seq_id)
        manager.grow(seq_id, 1, 0)
        copies.append((manager.block_table(1000)[0], manager.block_table(seq_id)[0]))

    width = max(manager.blocks_needed(row.num_computed + row.query_len) for row in rows)
    num_tokens = sum(row.query_len for row in rows)
    layout = StepLayout(num_tokens + padding[1], len(rows) + padding[0], width + padding[2])
    expected = reference_step(rows, layout, block_size, copies, UNTOUCHED)
    buffer = np.full(len(expected) + 10, UNTOUCHED, np.int32)
    used = manager.fill_step(
        buffer,
        num_rows=layout.num_rows,
        num_tokens=layout.num_tokens,
        table_width=layout.table_width,
        **arguments,
    )
    assert used == len(expected)
    np.testing.assert_array_equal(buffer[:used], expected)
    assert (buffer[used:] == UNTOUCHED).all()
    manager.check_integrity()


class Step:
    """A step of two rows, five tokens and one pending copy that is all right until a test changes something about it."""

    def __init__(self) -> None:
        self.manager = BlockManager(16, 4)
        for seq_id, num_tokens in ((1, 7), (2, 9)):
            self.manager.add(seq_id)
            self.manager.match_prefix(seq_id, array("i"), 0, "")
            self.manager.grow(seq_id, num_tokens, 0)
        self.manager.fork(1, 3)
        self.manager.grow(3, 7, 6)
        self.arguments: dict[str, Any] = {
            "num_rows": 2,
            "num_tokens": 5,
            "table_width": 3,
            "seq_ids": [3, 2],
            "num_computed": [6, 5],
            "query_lens": [1, 4],
            "token_ids": [array("i", range(6)), array("i", range(9))],
            "last_rows": [0, -1],
        }
        self.size = StepLayout(num_tokens=5, num_rows=2, table_width=3).copies + 2

    def fill(self, size: int | None = None) -> int:
        return self.manager.fill_step(np.zeros(self.size if size is None else size, np.int32), **self.arguments)


def test_the_buffer_may_be_exactly_as_large_as_needed() -> None:
    step = Step()
    assert step.fill() == step.size
    assert step.fill() == step.size - 2, "the copy is done"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_rows": 1}, "a step of 2 rows and 5 tokens does not fit num_rows 1, num_tokens 5"),
        ({"num_tokens": 4}, "does not fit num_rows 2, num_tokens 4"),
        ({"table_width": 2}, "row 1 of the step has more blocks than table_width"),
        ({"table_width": -1}, "table_width -1"),
        ({"query_lens": [0, 4]}, "row 0 of the step computes no tokens, and no row before it does"),
        ({"query_lens": [1, -1]}, "row 1 of the step computes or has computed fewer tokens than none"),
        ({"num_computed": [6, -1]}, "row 1 of the step"),
        ({"num_computed": [8, 5]}, "row 0 of the step reaches behind the sequence's blocks"),
        ({"num_computed": [2, 5]}, "row 0 of the step writes to a block that is shared"),
        ({"token_ids": [array("i", range(5)), array("i", range(9))]}, "row 0 of the step has more than one token"),
        (
            {"token_ids": [array("i", range(6)), array("i", range(8))]},
            "row 1 of the step has a token that is not known",
        ),
        ({"last_rows": [-1, -1]}, "row 0 of the step has a token that is not known"),
        ({"last_rows": [0]}, "last_rows must have 2 elements, got 1"),
        ({"seq_ids": [3]}, "must have 1 elements, got 2"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_and_its_copies_stay_pending(changes: dict[str, Any], text: str) -> None:
    step = Step()
    good = dict(step.arguments)
    step.arguments.update(changes)
    with pytest.raises(ValueError, match=text):
        step.fill(size=200)
    step.manager.check_integrity()
    step.arguments = good
    assert step.fill() == step.size


def test_a_buffer_that_is_too_small_is_refused_before_anything_is_written() -> None:
    step = Step()
    with pytest.raises(ValueError, match=f"needs a buffer of {step.size} int32, got {step.size - 1}"):
        step.fill(size=step.size - 1)
    assert step.fill() == step.size


def test_a_cached_block_is_not_writable() -> None:
    step = Step()
    step.manager.commit(2, array("i", range(9)), 8)
    with pytest.raises(ValueError, match="row 1 of the step writes to a block that is shared or cached"):
        step.fill()
    step.manager.grow(2, 9, 5)
    assert step.fill() == step.size


def test_only_known_sequences_and_writable_int32_buffers() -> None:
    step = Step()
    with pytest.raises(TypeError, match="buffer must be"):
        step.manager.fill_step(np.zeros(200, np.int64), **step.arguments)
    frozen = np.zeros(200, np.int32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        step.manager.fill_step(frozen, **step.arguments)
    step.arguments["seq_ids"] = [3, 77]
    with pytest.raises(KeyError, match="no sequence 77"):
        step.fill()


def test_tokens_are_copied_one_behind_the_other() -> None:
    tokens = [array("i", [1, 2, 3, 4]), array("i", [5]), array("i"), array("i", [6, 7])]
    out = np.full(10, UNTOUCHED, np.int32)
    assert copy_tokens(out, tokens, [1, 0, 0, 5], [3, 2, 1, 1], -1) == 7
    assert out.tolist() == [2, 3, 4, 5, -1, -1, -1, UNTOUCHED, UNTOUCHED, UNTOUCHED]


@pytest.mark.parametrize(("starts", "lengths"), [([0], [11]), ([-1], [1]), ([0], [-1]), ([0], [1, 1])])
def test_tokens_that_do_not_fit_are_refused(starts: list[int], lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not fit|must have 1 elements"):
        copy_tokens(np.zeros(10, np.int32), [array("i", [1])], starts, lengths, -1)
