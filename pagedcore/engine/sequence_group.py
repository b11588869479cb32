"""The sequences of one request, which are admitted, preempted, resumed and aborted together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from pagedcore._core import BlockManager
from pagedcore.engine.beam_search import BeamSearch, Continuation
from pagedcore.engine.logprobs import PromptLogprobs
from pagedcore.engine.seeds import mix_seed
from pagedcore.engine.sequence import FinishReason, Sequence

if TYPE_CHECKING:
    from pagedcore.engine.fair_queue import TenantAccount


class GroupStatus(Enum):
    """Where a group is. RUNNING ones own blocks of the device, SWAPPED ones blocks of the host, the others none."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass(frozen=True)
class BeamChange:
    """What becomes of block tables when beams go on: (beam, its fork), and beams that end."""

    forked: list[tuple[Sequence, Sequence]]
    dropped: list[Sequence]


class SequenceGroup:
    """Owns the unfinished sequences of a request and what is computed for them.

    `sequences` are in the order of their indices, or beams, best first. `active` are those that get rows in steps: the same
    ones, unless several of them have tokens in common that have to be computed (a prompt before the first draws; prompt and
    equal output after a preemption). Those tokens are then computed once, as the sequence `trunk` in the block table of
    `lead`, and when the last of them is planned, the other sequences fork that table and go on by themselves.
    `width` is how many rows and block tables the group may come to have.
    `arrival` orders groups that wait; `rank`, (priority, order of admission), those that have been admitted: the last one
    is preempted first. `account` is its tenant's.
    `held` are ended sequences whose outputs are still to be ranked. Steps before `restarted_at` do not concern it any more.
    `started_at`: the first step since it was last admitted; what earlier ones computed is in blocks that it gave back.
    `prompt_logprobs` are there as long as they are to be found or told. `num_ended_tokens`: output tokens of the sequences that
    have ended. `scheduled_at`, `first_token_at`: when the group was first admitted and drew first, by the engine's clock; None:
    not yet.
    """

    __slots__ = (
        "account",
        "active",
        "arrival",
        "finish_reason",
        "first_token_at",
        "has_branched",
        "held",
        "is_plain",
        "lead",
        "num_cached_tokens",
        "num_ended_tokens",
        "num_logprobs",
        "num_outputs",
        "num_prompt_tokens",
        "num_swapped_blocks",
        "priority",
        "prompt_logprobs",
        "rank",
        "ranks_outputs",
        "request_id",
        "restarted_at",
        "scheduled_at",
        "search",
        "sequences",
        "started_at",
        "status",
        "tenant",
        "trunk",
        "width",
    )

    account: TenantAccount

    def __init__(self, first: Sequence) -> None:
        """`first`: the sequence of index 0, or the first beam; the others come into being when the prompt has been computed."""
        params = first.request.sampling_params
        first.group = self
        self.request_id = first.request.request_id
        self.arrival = first.seq_id
        self.priority = params.priority
        self.tenant = params.tenant
        self.rank = (params.priority, first.seq_id)
        self.num_prompt_tokens = first.num_prompt_tokens
        self.sequences = [first]
        self.active = self.sequences
        self.lead = first
        self.trunk: Sequence | None = None
        self.width = params.num_sequences
        self.search = BeamSearch(params, first) if params.use_beam_search else None
        self.has_branched = self.width == 1 or self.search is not None
        self.num_outputs = params.n
        self.ranks_outputs = params.ranks_outputs
        self.held: list[Sequence] = []
        self.num_logprobs = -1 if params.logprobs is None else params.logprobs
        if self.ranks_outputs:
            self.num_logprobs = max(self.num_logprobs, 0) if self.search is None else self.search.num_candidates
        self.prompt_logprobs: PromptLogprobs | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = PromptLogprobs(first.num_prompt_tokens, params.prompt_logprobs)
        # Whether a token is all there is to say about a step.
        self.is_plain = self.num_logprobs < 0 and self.prompt_logprobs is None
        self.num_cached_tokens = 0
        self.num_swapped_blocks = 0  # when it was last swapped out
        self.num_ended_tokens = 0
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.restarted_at = 0
        self.started_at = 0
        self.status = GroupStatus.WAITING
        self.finish_reason: FinishReason | None = None  # why the group ended, unless its sequences did so by themselves

    @property
    def has_draws_in_flight(self) -> bool:
        return any(seq.num_in_flight or seq.awaits_choice for seq in self.sequences)

    @property
    def table_ids(self) -> list[int]:
        """The ids under which the block manager knows the group, while it owns blocks."""
        return [self.lead.seq_id] if self.trunk is not None else [seq.seq_id for seq in self.sequences]

    @property
    def num_cacheable_tokens(self) -> int:
        """How many tokens need not be computed where their K/V are at hand: not those that tell of unknown prompt tokens."""
        if self.prompt_logprobs is None or self.prompt_logprobs.is_complete:
            return self.lead.max_total_tokens
        return self.prompt_logprobs.num_known - 1

    def tell_prompt_logprobs(self) -> PromptLogprobs | None:
        """What is to be told with the first output, once: None where the prompt was not computed to its end."""
        told, self.prompt_logprobs = self.prompt_logprobs, None
        self.is_plain = self.num_logprobs < 0
        return told if told is not None and told.is_complete else None

    def begin(self) -> Sequence:
        """Set out to compute everything from the first token on; returns the sequence that gets blocks now."""
        self.active = self.sequences
        self.trunk = None
        self.lead = min(self.sequences, key=lambda seq: len(seq.token_ids))
        if len(self.sequences) > 1 or not self.has_branched:
            num_common = _common_length(self.sequences)
            self.trunk = self.lead if num_common == len(self.lead.token_ids) else self.lead.trunk(num_common)
            self.active = [self.trunk]
        return self.active[0]

    def branch(self, new_seq_id: Callable[[], int]) -> list[Sequence]:
        """Leave the trunk, whose last tokens are in the step being planned.

        Returns the trunk and, behind it, the sequences that draw from the logits of its last token in rows without tokens.
        The sequences' block tables are for `fork_tables`, when the step has been packed.
        """
        trunk = self.trunk
        assert trunk is not None
        if not self.has_branched:
            self.has_branched = True
            for index in range(1, self.width):
                self.sequences.append(self.lead.fork(new_seq_id(), mix_seed(self.lead.seed, index), index))
        num_common = len(trunk.token_ids)
        others = [seq for seq in self.sequences if seq is not trunk]
        for seq in others:
            seq.num_computed_tokens = num_common
        self.active = self.sequences
        self.trunk = None
        return [trunk, *(seq for seq in others if len(seq.token_ids) == num_common)]

    def replace_beams(self, continuations: list[Continuation], new_seq_id: Callable[[], int]) -> BeamChange:
        """Let the beams go on as chosen: the first continuation of a beam in its place, every other one in a fork of it."""
        change = BeamChange([], [])
        beams = self.sequences
        places: dict[int, Sequence] = {}
        going_on: list[Sequence] = []
        for continuation in continuations:
            parent = beams[continuation.beam]
            seq = parent
            if continuation.beam in places:
                seq = parent.fork(new_seq_id(), parent.seed, parent.index)
                change.forked.append((parent, seq))
            places[continuation.beam] = parent
            going_on.append(seq)
        for seq, continuation in zip(going_on, continuations, strict=True):
            seq.token_ids.append(continuation.token_id)
        change.dropped.extend(beam for place, beam in enumerate(beams) if place not in places)
        self.sequences = self.active = going_on
        return change

    def fork_tables(self, blocks: BlockManager) -> None:
        """Give every sequence the blocks of the trunk."""
        for seq in self.sequences:
            if seq is not self.lead:
                blocks.fork(self.lead.seq_id, seq.seq_id)

    def blocks_to_branch(self, blocks: BlockManager) -> int:
        """Blocks that the group will take, beyond those of what is computed first, until all its sequences have drawn again.

        That is the trunk, or a prompt behind which beams part.
        """
        num_to_come = 0 if self.has_branched and self.search is None else self.width - len(self.sequences)
        if self.trunk is None and num_to_come == 0:
            return 0
        num_common = len(self.active[0].token_ids)
        lengths = [len(seq.token_ids) for seq in self.sequences] + [num_common] * num_to_come
        num_shared = num_common // blocks.block_size
        last = self.lead.max_total_tokens - 1  # the last token drawn is never written
        own = sum(blocks.blocks_needed(min(length + 1, last)) - num_shared for length in lengths)
        return num_shared + own - blocks.blocks_needed(num_common)

    def blocks_to_go_on(self, blocks: BlockManager) -> int:
        """The most blocks that the group will take for a step, beyond those it holds."""
        return sum(
            1 + blocks.blocks_needed(seq.num_tokens) - blocks.blocks_needed(seq.num_computed_tokens)
            for seq in self.sequences
        )

    def restart(self) -> None:
        """Forget what has been computed."""
        self.active = self.sequences
        self.trunk = None
        if self.search is not None:
            self.search.forget()
        for seq in self.sequences:
            seq.num_computed_tokens = 0
            seq.awaits_choice = False


def blocks_of_group(blocks: BlockManager, num_prompt_tokens: int, max_total_tokens: int, width: int) -> int:
    """The most blocks a request can need: full prompt blocks are shared, everything behind them is each sequence's own."""
    num_shared = num_prompt_tokens // blocks.block_size if width > 1 else 0
    return num_shared + width * (blocks.blocks_needed(max_total_tokens - 1) - num_shared)


def _common_length(sequences: list[Sequence]) -> int:
    """The number of leading tokens that all have in common."""
    token_ids = [seq.token_ids for seq in sequences]
    low, high = min(token_ids), max(token_ids)  # in lexicographic order: what these two share, all share
    length = min(len(low), len(high))
    differences = np.flatnonzero(np.array(low[:length]) != np.array(high[:length]))
    return int(differences[0]) if len(differences) else length
