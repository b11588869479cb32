"""Figure 15: how much memory samples and beams of one request save by sharing blocks, counted by the real block manager."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks import report
from benchmarks.paper import plots
from benchmarks.paper.shapes import paper_row
from benchmarks.paper.workloads import ALPACA, DATA, SHAREGPT, LengthSource
from pagedcore._core import BlockManager
from pagedcore.engine.step_plan import StepLayout

BLOCK_SIZE = 16
# Figure 15, in percent: Alpaca at widths 2, 4 and 6. Of ShareGPT the paper gives the range.
WIDTHS = (2, 4, 6)
PAPER = {
    ("Alpaca", "parallel sampling"): (6.09, 8.53, 9.79),
    ("Alpaca", "beam search"): (37.56, 53.13, 55.16),
    ("ShareGPT", "parallel sampling"): (16.2, None, 30.5),
    ("ShareGPT", "beam search"): (44.3, None, 66.3),
}


@dataclass(frozen=True)
class Saving:
    """Blocks summed over all steps of all requests: those used, and those that sequences without sharing would have used.

    `num_copies`: blocks copied on a write, in `num_rows` (steps times sequences).
    """

    used: int
    unshared: int
    num_copies: int
    num_rows: int

    @property
    def percent(self) -> float:
        """Blocks saved by sharing / blocks without sharing, in percent (section 6.3)."""
        return 100 * (1 - self.used / self.unshared)


class _Group:
    """The sequences of one request on a block manager of their own."""

    def __init__(self, prompt_len: int, width: int, max_tokens: int) -> None:
        self.blocks = BlockManager(width * (max_tokens // BLOCK_SIZE + 2), BLOCK_SIZE, enable_prefix_caching=False)
        self._buffer = np.zeros(StepLayout(0, 0, 0).copies + 4 * width, dtype=np.int32)
        self.used = self.unshared = self.num_copies = self.num_rows = 0
        self.ids = list(range(width))
        self._next_id = width
        self.blocks.add(0)
        assert self.blocks.grow(0, prompt_len, 0)
        for seq_id in self.ids[1:]:
            self.blocks.fork(0, seq_id)

    def fork(self, parent: int) -> int:
        child, self._next_id = self._next_id, self._next_id + 1
        self.blocks.fork(parent, child)
        return child

    def step(self, num_tokens: int) -> None:
        """Each sequence writes the token that makes it `num_tokens` long; shared blocks are copied first."""
        for seq_id in self.ids:
            assert self.blocks.grow(seq_id, num_tokens, num_tokens - 1)
        end = self.blocks.fill_step(
            self._buffer,
            num_rows=0,
            num_tokens=0,
            table_width=0,
            seq_ids=[],
            num_computed=[],
            query_lens=[],
            token_ids=[],
            last_rows=[],
        )
        self.num_copies += (end - StepLayout(0, 0, 0).copies) // 2
        self.num_rows += len(self.ids)
        self.used += self.blocks.num_blocks - self.blocks.num_free_blocks
        self.unshared += len(self.ids) * self.blocks.blocks_needed(num_tokens)

    def reorder(self, parents: list[int]) -> None:
        """Beam i goes on from the beam that was parents[i]: a parent's first child takes it over, the others are forks."""
        children = defaultdict(list)
        for beam, parent in enumerate(parents):
            children[parent].append(beam)
        ids = [-1] * len(self.ids)
        for parent, beams in children.items():
            ids[beams[0]] = self.ids[parent]
            for beam in beams[1:]:
                ids[beam] = self.fork(self.ids[parent])
        for parent, seq_id in enumerate(self.ids):
            if parent not in children:
                self.blocks.release(seq_id)
        self.ids = ids


def _total(groups: Iterable[_Group]) -> Saving:
    used = unshared = copies = rows = 0
    for group in groups:
        used += group.used
        unshared += group.unshared
        copies += group.num_copies
        rows += group.num_rows
    return Saving(used, unshared, copies, rows)


def parallel_sampling(lengths: LengthSource, num_samples: int, num_requests: int) -> Saving:
    """Samples that all have the output length their request has in the data set."""

    def serve(prompt_len: int, output_len: int) -> _Group:
        group = _Group(prompt_len, num_samples, prompt_len + output_len)
        for step in range(1, output_len + 1):
            group.step(prompt_len + step)
        return group

    drawn = lengths.sample(num_requests, seed=5)
    return _total(map(serve, drawn.prompts.tolist(), drawn.outputs.tolist()))


def recorded_parents(width: int) -> list[list[list[int]]]:
    """Recorded beam searches: for each prompt and step, the parent of each of `width` beams."""
    with gzip.open(DATA / "beam_parents.json.gz", "rt", encoding="utf-8") as stream:
        flat: list[list[int]] = json.load(stream)[str(width)]
    return [[steps[at : at + width] for at in range(0, len(steps), width)] for steps in flat]


def beam_search(lengths: LengthSource, width: int, num_requests: int) -> Saving:
    """Recorded searches in turn, under prompts and output lengths of `lengths`; outputs end with the record at the latest."""

    def serve(prompt_len: int, output_len: int, parents: list[list[int]]) -> _Group:
        steps = min(output_len, len(parents))
        group = _Group(prompt_len, width, prompt_len + steps)
        for step in range(1, steps + 1):
            group.step(prompt_len + step)
            group.reorder(parents[step - 1])
        return group

    records = recorded_parents(width)
    drawn = lengths.sample(num_requests, seed=5)
    return _total(
        serve(prompt, output, records[number % len(records)])
        for number, (prompt, output) in enumerate(zip(drawn.prompts.tolist(), drawn.outputs.tolist(), strict=True))
    )


def figure_15() -> list[report.Row]:
    """Memory saved by sharing, for samples and for beams."""
    rows = []
    with plots.figure("fig15", columns=2, rows=2, size=(3.9, 2.6)) as axes:
        for axis, ((name, method), paper) in zip(axes, PAPER.items(), strict=True):
            lengths, count = (ALPACA, 1000) if name == "Alpaca" else (SHAREGPT, 300)
            serve = parallel_sampling if method == "parallel sampling" else beam_search
            savings = [serve(lengths, width, count) for width in WIDTHS]
            series = [("block manager", plots.COLORS["paged"], [saving.percent for saving in savings])]
            series.append(("paper", plots.PAPER_COLOR, [value or 0.0 for value in paper]))
            plots.bars(axis, [str(width) for width in WIDTHS], series)
            axis.set_title(f"{name}, {method}")
            axis.set_xlabel("samples" if method == "parallel sampling" else "beam width")
            axis.set_ylabel("memory saved (%)")
            axis.legend(loc="upper left")
            for width, saving, value in zip(WIDTHS, savings, paper, strict=True):
                if value is not None:
                    rows.append(paper_row(f"fig 15: {name}, {method}, {width}", saving.percent, "%", value))
            if method == "beam search":
                copies = savings[-1].num_copies / savings[-1].num_rows
                rows.append(
                    report.row(
                        f"fig 15: {name}, blocks copied a beam and step, {WIDTHS[-1]} beams",
                        copies,
                        "blocks",
                        "at most",
                        1.0,
                        higher_is_better=False,
                    )
                )
    return rows
