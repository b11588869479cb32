"""An executor that carries out packed steps on a memory of hashes, and fails where the scenario says so."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from pagedcore.engine.executor import KVCacheShape
from pagedcore.engine.step_plan import (
    HEADER_SIZE,
    NUM_SAMPLING_COLUMNS,
    Int32Array,
    LogprobArrays,
    StepPlan,
    StepResult,
)
from tests.simulation import fake_model
from tests.simulation.failure import require
from tests.simulation.fake_model import POISON, ROOT
from tests.simulation.scenario import BadLogits, Fault, Setup, StepFailure, SwapFailure
from tests.simulation.watched_blocks import WatchedBlocks

_MASK32 = 2**32 - 1


class PlannedFailureError(RuntimeError):
    """What a step raises that the scenario lets fail."""


@dataclass(frozen=True)
class ExecutorFaults:
    """After how many operations steps fail, by step id or by the number of a step that swaps; which rows are bad, by step id."""

    num_done: dict[int, int]
    num_done_of_swaps: dict[int, int]
    bad_rows: dict[int, int]

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> ExecutorFaults:
        faults = [*faults]
        return cls(
            {fault.step: fault.num_done for fault in faults if isinstance(fault, StepFailure)},
            {fault.number: fault.num_done for fault in faults if isinstance(fault, SwapFailure)},
            {fault.step: fault.modulus for fault in faults if isinstance(fault, BadLogits)},
        )

    @property
    def num_failures(self) -> int:
        """How many steps may fail."""
        return len(self.num_done) + len(self.num_done_of_swaps)


@dataclass(frozen=True)
class _Row:
    """A row of the packed step that draws: the context behind its last token, and how it samples."""

    context: int
    temperature: int
    seed: int
    draw_index: int

    def draw(self) -> int:
        return fake_model.draw(self.context, self.seed if self.temperature else None, self.draw_index)


class _Launched:
    """A step whose work is done when its result is wanted, or was at the launch."""

    def __init__(self, run: Callable[[], StepResult], on_wait: Callable[[], None], *, eagerly: bool) -> None:
        self._run, self._on_wait = run, on_wait
        self._result: StepResult | None = None
        self._error: PlannedFailureError | None = None
        if eagerly:
            self._finish()

    def _finish(self) -> None:
        try:
            self._result = self._run()
        except PlannedFailureError as error:
            self._error = error

    def wait(self) -> StepResult:
        self._on_wait()
        if self._result is None and self._error is None:
            self._finish()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


class SimulatedExecutor:
    """Owns the K/V memory of device and host, [num_blocks][block_size] hashes, and the ids that the step before drew."""

    def __init__(self, setup: Setup, blocks: WatchedBlocks, on_wait: Callable[[], None]) -> None:
        self.kv_cache_shape = KVCacheShape(setup.num_blocks, setup.num_host_blocks, setup.block_size)
        self.step_sizes = setup.step_sizes
        self.num_launched = 0
        self._setup = setup
        blocks.on_commit = self._check_contents
        self._blocks = blocks
        self._faults = ExecutorFaults({}, {}, {})
        self._first_step = 0
        self._num_swapping_steps = 0
        self._on_wait = on_wait
        self._device = [[POISON] * setup.block_size for _ in range(setup.num_blocks)]
        self._host = [[POISON] * setup.block_size for _ in range(setup.num_host_blocks)]
        self._buffers = [np.full(2048, -7, np.int32) for _ in range(3)]
        self._last_ids: list[int] = []
        self._failed_at = -1  # step id
        self._may_read_poison = False
        self._num_left = -1  # operations until the step fails; negative: it does not

    def arm(self, faults: ExecutorFaults) -> None:
        """Let these steps fail, counted from the next one on."""
        self._faults = faults
        self._first_step = self.num_launched

    def step_buffers(self) -> list[Int32Array]:
        return self._buffers

    def launch(self, plan: StepPlan) -> _Launched:
        self.num_launched += 1
        fresh = self._blocks.take_fresh_blocks()
        if plan.swapped:
            self._check_swaps(plan)
        return _Launched(lambda: self._run(plan, fresh), self._on_wait, eagerly=self._setup.launches_eagerly)

    def shutdown(self) -> None:
        """Nothing to release."""

    def _count_operation(self) -> None:
        if self._num_left == 0:
            raise PlannedFailureError("the step fails as planned")
        self._num_left -= 1

    def _run(self, plan: StepPlan, fresh: list[int]) -> StepResult:
        self._may_read_poison = self._failed_at == plan.step_id - 1  # launched before that was known; of no use now
        self._num_left = self._planned_failure(plan)
        try:
            return self._carry_out(plan, fresh)
        except PlannedFailureError:
            self._failed_at = plan.step_id
            raise

    def _copy(self, pairs: list[int], source: list[list[int]], destination: list[list[int]]) -> None:
        """One pair after the other, in memory that is the same for both or not: so the pairs must be independent."""
        written = pairs[1::2]
        require(len(set(written)) == len(written), "two copies write the same block")
        require(source is not destination or not set(pairs[::2]) & set(written), "a copy reads what another one writes")
        for src, dst in zip(pairs[::2], written, strict=True):
            self._count_operation()
            destination[dst][:] = source[src]

    def _check_swaps(self, plan: StepPlan) -> None:
        """What comes in goes to blocks that the groups still have, each once: any other may be somebody else's."""
        data: list[int] = plan.buffer[: plan.used].tolist()
        _, _, ins, end = _copy_sections(data)
        owned: set[int] = set()
        for group in plan.swapped:
            for seq_id in self._blocks.resident.intersection(group.table_ids):
                owned.update(self._blocks.block_table(seq_id))
        foreign = set(data[ins + 1 : end : 2]) - owned
        require(not foreign, f"blocks {sorted(foreign)} come in that are in no table of their group")

    def _planned_failure(self, plan: StepPlan) -> int:
        """After how many operations the step fails; -1: it does not."""
        num_done = self._faults.num_done.get(plan.step_id - self._first_step, -1)
        if plan.swapped:
            num_done = self._faults.num_done_of_swaps.get(self._num_swapping_steps, num_done)
            self._num_swapping_steps += 1
        return num_done

    def _carry_out(self, plan: StepPlan, fresh: list[int]) -> StepResult:
        data: list[int] = plan.buffer[: plan.used].tolist()
        num_rows, num_real_rows, max_logprobs, num_targets, num_prompt_top = (data[i] for i in (1, 4, 11, 14, 15))
        copies, outs, ins, sources = _copy_sections(data)
        targets = sources + num_targets
        sampling = copies - num_rows * NUM_SAMPLING_COLUMNS
        self._copy(data[outs:ins], self._device, self._host)
        for block in fresh:
            self._device[block][:] = [POISON] * self._setup.block_size
        self._copy(data[ins:sources], self._host, self._device)
        self._copy(data[copies:outs], self._device, self._device)
        contexts = self._compute(data)
        if self._num_left >= 0:
            raise PlannedFailureError("the step fails as planned, at its end")
        rows = []
        for row, context in enumerate(contexts):
            at = sampling + row * NUM_SAMPLING_COLUMNS
            temperature, _, _, _, low, high, draw_index, _ = data[at : at + NUM_SAMPLING_COLUMNS]
            rows.append(_Row(context, temperature, low & _MASK32 | (high & _MASK32) << 32, draw_index))
        ids = [row.draw() for row in rows]
        self._last_ids = ids
        modulus = self._faults.bad_rows.get(plan.step_id - self._first_step)
        told = ids if modulus is None else [-1 if row % modulus == 0 else drawn for row, drawn in enumerate(ids)]
        require(len(told) == num_real_rows, "a row has no context")
        of_prompts = None
        if num_targets:
            tokens = data[sources:targets]
            require(max(tokens) < data[3], "padding is to say how likely a prompt is")
            prefixes = [self._context_at(data, token) for token in tokens]
            of_prompts = _logprobs_of(prefixes, data[targets : targets + num_targets], num_prompt_top)
            if modulus is not None:
                of_prompts.chosen_logprobs[np.array(tokens) % modulus == 0] = np.nan
        return _result(told, contexts, max_logprobs, of_prompts)

    def _compute(self, data: list[int]) -> list[int]:
        """Write the K/V of every token and read every row's context back; returns the contexts, row by row."""
        num_tokens, num_rows, width, num_real_tokens, num_real_rows = data[:5]
        positions = HEADER_SIZE + num_tokens
        slots = positions + num_tokens
        starts = slots + num_tokens
        lens = starts + num_rows + 1
        tables = lens + num_rows
        self._check_sizes(data, data[slots : slots + num_tokens])
        device, block_size = self._device, self._setup.block_size
        contexts: list[int] = []
        for row in range(num_real_rows):
            begin, end = data[starts + row], data[starts + row + 1]
            if begin == end:
                contexts.append(contexts[-1])  # it draws from the last token of the row before it
                continue
            seq_len = data[lens + row]
            table = data[tables + row * width : tables + (row + 1) * width]
            position = seq_len - (end - begin)
            before = device[table[(position - 1) // block_size]][(position - 1) % block_size] if position else ROOT
            for at in range(begin, end):
                self._count_operation()
                block, offset = table[position // block_size], position % block_size
                require(data[positions + at] == position, f"row {row}: wrong position")
                require(data[slots + at] == block * block_size + offset, f"row {row}: the slot is not in its table")
                before = fake_model.entry(before, self._input_id(data[HEADER_SIZE + at]), position)
                device[block][offset] = before
                position += 1
            used = table[: -(-seq_len // block_size)]
            entries = list(chain.from_iterable([device[block] for block in used]))[:seq_len]
            require(self._may_read_poison or POISON not in entries, f"row {row} reads a slot that nobody wrote")
            contexts.append(fake_model.context_of(entries))
        require(data[starts + num_real_rows] == num_real_tokens, "tokens belong to no row")
        return contexts

    def _context_at(self, data: list[int], token: int) -> int:
        """The context behind a token of the step that has just been computed."""
        num_tokens, num_rows, width = data[:3]
        starts = HEADER_SIZE + 3 * num_tokens
        row = bisect_right(data, token, starts, starts + num_rows + 1) - 1 - starts
        table = starts + 2 * num_rows + 1 + row * width
        block_size = self._setup.block_size
        positions = range(data[HEADER_SIZE + num_tokens + token] + 1)
        entries = [self._device[data[table + p // block_size]][p % block_size] for p in positions]
        return fake_model.context_of(entries)

    def _check_contents(self, table: list[int], token_ids: array[int], num_computed: int) -> None:
        """Tokens that are said to be computed have their K/V in the blocks that are said to hold it."""
        before, block_size = ROOT, self._setup.block_size
        for position in range(min(num_computed, len(token_ids)) // block_size * block_size):
            before = fake_model.entry(before, token_ids[position], position)
            held = self._device[table[position // block_size]][position % block_size]
            require(held == before, f"a block is registered without the K/V of its tokens, at position {position}")

    def _input_id(self, token_id: int) -> int:
        """The token to compute; behind a step that failed, what the device holds of an older one."""
        if token_id >= 0:
            return token_id
        return self._last_ids[-1 - token_id] if -token_id <= len(self._last_ids) else 0

    def _check_sizes(self, data: list[int], slots: list[int]) -> None:
        num_tokens, num_rows, _, num_real_tokens, num_real_rows = data[:5]
        require(num_real_tokens <= self._setup.max_num_batched_tokens, f"{num_real_tokens} tokens are over the budget")
        require(0 < num_real_rows <= self._setup.max_num_seqs, f"{num_real_rows} rows are over max_num_seqs")
        require(num_real_tokens <= num_tokens and num_real_rows <= num_rows, "a step is larger than with its padding")
        real, padding = slots[:num_real_tokens], slots[num_real_tokens:]
        require(len(set(real)) == len(real), "a slot is written twice in a step")
        require(all(slot == -1 for slot in padding), "padding has a slot")


def _copy_sections(data: list[int]) -> tuple[int, int, int, int]:
    """Where a step's copies on the device, to the host and from the host begin, and where the last ones end."""
    num_tokens, num_rows, width, _, _, _, _, num_copies = data[:8]
    num_outs, num_ins = data[12:14]
    copies = HEADER_SIZE + 3 * num_tokens + 2 * num_rows + 1 + num_rows * (width + NUM_SAMPLING_COLUMNS)
    outs = copies + 2 * num_copies
    ins = outs + 2 * num_outs
    return copies, outs, ins, ins + 2 * num_ins


def _result(
    token_ids: list[int], contexts: list[int], max_logprobs: int, of_prompts: LogprobArrays | None
) -> StepResult:
    ids = np.array(token_ids, np.int32)
    if max_logprobs < 0:
        return StepResult(ids, prompt_logprobs=of_prompts)
    drawn = _logprobs_of(contexts, token_ids, max_logprobs)
    return StepResult(
        ids, drawn.chosen_logprobs, drawn.chosen_ranks, drawn.top_logprobs, drawn.top_token_ids, of_prompts
    )


def _logprobs_of(contexts: list[int], token_ids: list[int], num_top: int) -> LogprobArrays:
    values = [fake_model.logprobs(context) for context in contexts]
    top = [fake_model.most_likely(row, num_top) for row in values]
    chosen = [row[token_id] for row, token_id in zip(values, token_ids, strict=True)]
    shape = (len(token_ids), num_top)
    return LogprobArrays(
        np.array(chosen, np.float32),
        np.array([sum(v > own for v in row) + 1 for row, own in zip(values, chosen, strict=True)], np.int32),
        np.array([[row[t] for t in ids] for row, ids in zip(values, top, strict=True)], np.float32).reshape(shape),
        np.array(top, np.int32).reshape(shape),
    )
