"""An executor whose "KV cache" holds hashes, so that any error in block tables, slots or copies changes a token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pagedcore.engine.executor import KVCacheShape
from pagedcore.engine.step_plan import (
    HEADER_SIZE,
    Header,
    Int32Array,
    LogprobArrays,
    SamplingColumn,
    StepLayout,
    StepPlan,
    StepResult,
)
from pagedcore.engine.step_sizes import NO_PADDING

_MASK = 2**64 - 1
_ROOT = 0x5851F42D4C957F2D


def _mix(state: int, value: int) -> int:
    x = (state ^ (value + 0x9E3779B97F4A7C15)) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return (x ^ (x >> 27)) & _MASK


def _entry(token: int, position: int) -> int:
    """What the model writes into a slot: depends on token and position, as K and V do."""
    return _mix(_mix(1, token), position)


def _state(entries: Sequence[int]) -> int:
    """Everything in the context."""
    state = _ROOT
    for entry in entries:
        state = _mix(state, entry)
    return state


def _logprobs(entries: Sequence[int], vocab_size: int) -> list[float]:
    """A log probability for every token; nearly all different, in no relation to what `_draw` draws."""
    state = _state(entries)
    return [-((_mix(state, token) >> 8) % 100_003) / 4096 for token in range(vocab_size)]


def _draw(entries: Sequence[int], sampling: Sequence[int], vocab_size: int) -> int:
    """The next token: a function of everything in the context and, in a random row, of seed and draw index."""
    state = _state(entries)
    if sampling[SamplingColumn.TEMPERATURE] != 0:
        for column in (SamplingColumn.SEED_LOW, SamplingColumn.SEED_HIGH, SamplingColumn.DRAW_INDEX):
            state = _mix(state, sampling[column])
    return state % vocab_size


def reference_tokens(
    prompt: Sequence[int],
    max_tokens: int,
    vocab_size: int,
    stop_token_ids: frozenset[int] = frozenset(),
    sampling: Sequence[int] = (0,) * len(SamplingColumn),
) -> list[int]:
    """The continuation of one prompt by the same model, without blocks or batches; `sampling`: a packed row, greedy if zeros."""
    tokens = list(prompt)
    columns = list(sampling)
    while len(tokens) < len(prompt) + max_tokens:
        entries = [_entry(token, position) for position, token in enumerate(tokens)]
        columns[SamplingColumn.DRAW_INDEX] = len(tokens) - len(prompt)
        tokens.append(_draw(entries, columns, vocab_size))
        if tokens[-1] in stop_token_ids:
            break
    return tokens[len(prompt) :]


def reference_logprob(prompt: Sequence[int], output: Sequence[int], vocab_size: int) -> float:
    """The cumulative log probability that the model gives an output."""
    tokens = [*prompt, *output]
    entries = [_entry(token, position) for position, token in enumerate(tokens)]
    return sum(_logprobs(entries[:at], vocab_size)[tokens[at]] for at in range(len(prompt), len(tokens)))


def reference_prompt_logprobs(prompt: Sequence[int], vocab_size: int) -> list[list[float]]:
    """For every prompt token but the first, the log probabilities of all tokens there."""
    entries = [_entry(token, position) for position, token in enumerate(prompt)]
    return [_logprobs(entries[:at], vocab_size) for at in range(1, len(prompt))]


class _Done:
    def __init__(self, result: Callable[[], StepResult]) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result()


class FakeExecutor:
    """Reads every slot of a row's context back through its block table; unwritten slots hold poison.

    Work is done in `wait`, as late as possible, so that a plan made one step ahead cannot peek at drawn tokens.
    `fail_steps`: step ids whose wait() raises. `broken_steps`: ids of steps that report logits that are not finite;
    `broken_prompts`, only of the prompt tokens whose log probabilities they find. `short_steps`: ids of steps whose result
    lacks rows. `hang`: steps wait for it, from the one with the id `hang_from` on; `hangs` is set when one does.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        *,
        max_rows: int,
        max_tokens: int,
        max_width: int,
        num_host_blocks: int = 0,
    ) -> None:
        self.kv_cache_shape = KVCacheShape(num_blocks, num_host_blocks, block_size)
        self.step_sizes = NO_PADDING
        self.fail_steps: set[int] = set()
        self.broken_steps: set[int] = set()
        self.broken_prompts: set[int] = set()
        self.short_steps: set[int] = set()
        self.hang: threading.Event | None = None
        self.hang_from = 0
        self.hangs = threading.Event()
        self.shutdown_error: Exception | None = None
        self.num_rows: list[int] = []
        self.num_tokens: list[int] = []
        self.num_copies: list[int] = []
        self._vocab_size = vocab_size
        self._kv = np.full(num_blocks * block_size, -1, dtype=object)
        self._host_kv = np.full(num_host_blocks * block_size, -1, dtype=object)
        self._block_size = block_size
        size = StepLayout(max_tokens, max_rows, max_width).copies + 64 * 1024
        self._buffers = [np.full(size, -7, dtype=np.int32) for _ in range(3)]
        self._last_ids: dict[int, int] = {}

    def step_buffers(self) -> list[Int32Array]:
        return self._buffers

    def launch(self, plan: StepPlan) -> _Done:
        return _Done(lambda: self._run(plan))

    def shutdown(self) -> None:
        """Finish what was launched, as the real ones do; raises `shutdown_error` if there is one."""
        if self.hang is not None:
            self.hang.wait()
        if self.shutdown_error is not None:
            raise self.shutdown_error

    def _copy(self, pairs: Int32Array, source: npt.NDArray[np.object_], destination: npt.NDArray[np.object_]) -> None:
        """All at once: every source is read as it was before the first destination is written."""
        bs = self._block_size
        contents = [source[src * bs : (src + 1) * bs].copy() for src, _ in pairs.reshape(-1, 2).tolist()]
        for (_, dst), block in zip(pairs.reshape(-1, 2).tolist(), contents, strict=True):
            destination[dst * bs : (dst + 1) * bs] = block

    def _run(self, plan: StepPlan) -> StepResult:
        if self.hang is not None and plan.step_id >= self.hang_from:
            self.hangs.set()
            self.hang.wait()
        if plan.step_id in self.fail_steps:
            self._last_ids = {}  # what a step that was launched behind it refers to is nothing of use
            raise RuntimeError("planted failure")
        buffer = plan.buffer
        header = Header(*buffer[: len(Header._fields)].tolist())
        layout = StepLayout(header.num_tokens, header.num_rows, header.table_width)
        assert layout.token_ids == HEADER_SIZE
        bs = self._block_size
        at = layout.copies + 2 * header.num_copies
        for count, source, destination in (
            (header.num_swap_outs, self._kv, self._host_kv),
            (header.num_swap_ins, self._host_kv, self._kv),
        ):
            self._copy(buffer[at : at + 2 * count], source, destination)
            at += 2 * count
        self._copy(buffer[layout.copies : layout.copies + 2 * header.num_copies], self._kv, self._kv)
        starts = buffer[layout.query_start_loc : layout.query_start_loc + header.num_rows + 1].tolist()
        assert (buffer[layout.slot_mapping + header.num_real_tokens : layout.query_start_loc] == -1).all()
        assert (buffer[layout.seq_lens + header.num_real_rows : layout.block_tables] == 0).all()
        ids: dict[int, int] = {}
        entries: list[int] = []
        contexts: list[list[int]] = []
        prefixes: list[list[int]] = []  # what each token of the step sees
        for row in range(header.num_real_rows):
            seq_len = int(buffer[layout.seq_lens + row])
            table_at = layout.block_tables + row * header.table_width
            table = buffer[table_at : table_at + header.table_width].tolist()
            first = seq_len - (starts[row + 1] - starts[row])
            for offset, index in enumerate(range(starts[row], starts[row + 1])):
                token = int(buffer[layout.token_ids + index])
                token = self._last_ids.get(-1 - token, 0) if token < 0 else token
                position = int(buffer[layout.positions + index])
                slot = int(buffer[layout.slot_mapping + index])
                assert position == first + offset
                assert slot == table[position // bs] * bs + position % bs
                self._kv[slot] = _entry(token, position)
            if starts[row + 1] > starts[row]:  # else it draws from the row before it
                entries = [self._kv[table[p // bs] * bs + p % bs] for p in range(seq_len)]
            assert -1 not in entries, "read a slot nobody wrote"
            at = layout.sampling + row * len(SamplingColumn)
            ids[row] = _draw(entries, buffer[at : at + len(SamplingColumn)].tolist(), self._vocab_size)
            contexts.append(entries)
            prefixes += [entries[: seq_len - n] for n in reversed(range(starts[row + 1] - starts[row]))]
        self._last_ids = ids
        self.num_rows.append(header.num_real_rows)
        self.num_tokens.append(header.num_real_tokens)
        self.num_copies.append(header.num_copies)
        if plan.step_id in self.broken_steps:
            ids = dict.fromkeys(ids, -1)
        drawn = [ids[row] for row in range(header.num_real_rows)]
        token_ids = np.array(drawn[1:] if plan.step_id in self.short_steps else drawn, dtype=np.int32)
        of_prompts = None
        if header.num_prompt_targets:
            begin, count = header.prompt_sources_offset, header.num_prompt_targets
            sources, targets = buffer[begin : begin + 2 * count].reshape(2, count).tolist()
            of_prompts = self._find_logprobs([prefixes[i] for i in sources], targets, header.max_prompt_logprobs)
            if plan.step_id in self.broken_prompts:
                of_prompts.chosen_logprobs[:] = np.nan
        if header.max_logprobs < 0:
            return StepResult(token_ids, prompt_logprobs=of_prompts)
        found = self._find_logprobs(contexts, drawn, header.max_logprobs)
        return StepResult(
            token_ids, found.chosen_logprobs, found.chosen_ranks, found.top_logprobs, found.top_token_ids, of_prompts
        )

    def _find_logprobs(self, contexts: list[list[int]], chosen_ids: list[int], num_top: int) -> LogprobArrays:
        logprobs = np.array([_logprobs(context, self._vocab_size) for context in contexts], np.float32)
        chosen = logprobs[np.arange(len(chosen_ids)), chosen_ids]
        ranks = (logprobs > chosen[:, None]).sum(axis=1, dtype=np.int32) + np.int32(1)
        top = np.argsort(-logprobs, axis=1, kind="stable")[:, :num_top].astype(np.int32)
        return LogprobArrays(chosen, ranks, np.take_along_axis(logprobs, top.astype(np.int64), axis=1), top)
