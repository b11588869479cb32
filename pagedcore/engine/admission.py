"""Decides who may run: which requests can ever be served, who is admitted next, and who has to go for that."""

from __future__ import annotations

from pagedcore._core import BlockManager
from pagedcore.engine.lifecycle import GroupLifecycle
from pagedcore.engine.memory_policy import MemoryPolicy
from pagedcore.engine.pinned_prefixes import PinnedPrefixes
from pagedcore.engine.precedence import Shortage, count_victims
from pagedcore.engine.request import Request
from pagedcore.engine.scheduler_config import SchedulerConfig
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.sequence_group import GroupStatus, SequenceGroup, blocks_of_group
from pagedcore.engine.step_packer import Rows
from pagedcore.engine.swap_space import SwapSpace
from pagedcore.errors import RequestError


class Admission:
    """Takes groups off the waiting and the preempted ones, in order, while there are rows, tokens and blocks for them.

    While a group is preempted, only more urgent ones are admitted. A waiting group may preempt less urgent ones, where it
    lacks rows or blocks.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        policy: MemoryPolicy,
        groups: GroupLifecycle,
        swap_space: SwapSpace,
        pinned: PinnedPrefixes,
    ) -> None:
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._config = config
        self._blocks = blocks
        self._policy = policy
        self._groups = groups
        self._swap_space = swap_space
        self._pinned = pinned
        self._watermark_blocks = int(blocks.num_blocks * config.watermark) if policy.is_paged else 0
        self._refused_at: tuple[SequenceGroup, int] | None = None  # group that had no room, and the free blocks then

    def check_fits(self, request: Request, max_total_tokens: int) -> None:
        """Raise RequestError for a request that could not finish even with the whole pool to itself."""
        width, num_prompt_tokens = request.sampling_params.num_sequences, len(request.prompt_token_ids)
        if width > self._config.max_num_seqs:
            raise RequestError(
                f"n, best_of and beam_width must be at most {self._config.max_num_seqs} (max_num_seqs), got {width}"
            )
        num_pinned = self._pinned.num_blocks
        if self._policy.is_paged:
            needed = blocks_of_group(self._blocks, num_prompt_tokens, max_total_tokens, width)
            num_pinned -= self._pinned.num_shared_blocks(request)
            available = "the pool has"
        elif width == 1:
            needed = self._blocks.blocks_needed(self._policy.most_tokens(max_total_tokens))
            available = "the longest contiguous range of the pool has"
        else:
            raise RequestError(
                f"n, best_of and beam_width must be 1 with kv_policy {self._policy.name!r}, which shares no blocks, got {width}"
            )
        num_blocks = self._blocks.max_blocks_per_sequence - num_pinned
        if needed > num_blocks:
            more = f"up to {max_total_tokens - num_prompt_tokens} more"
            raise RequestError(
                f"prompt of {num_prompt_tokens} tokens with {more if width == 1 else f'{width} times {more}'} needs {needed} "
                f"KV-cache blocks of {self._blocks.block_size} tokens, but {available} {num_blocks}"
                f"{f' beside {num_pinned} pinned ones that it does not share' if num_pinned else ''}; "
                f"shorten the prompt or lower max_tokens{'' if width == 1 else ' or the number of sequences'}"
            )

    def make_way(self) -> None:
        """Preempt less urgent groups for the first one that waits, where that gets it rows and blocks."""
        group = self._next_to_admit()
        if group is None or group.status is not GroupStatus.WAITING:
            return
        num_tokens = group.num_prompt_tokens  # none of them may be in the prefix cache
        needed = blocks_of_group(self._blocks, num_tokens, num_tokens + 2, group.width) + self._watermark_blocks
        shortage = Shortage(
            num_rows=self._groups.num_reserved_rows + group.width - self._config.max_num_seqs,
            num_blocks=min(needed, self._blocks.num_blocks) - self._blocks.num_free_blocks,
        )
        for _ in range(count_victims(group, self._groups.running, shortage, self._blocks)):
            self._groups.preempt(self._groups.running[-1])

    def admit(self, decodes: Rows, chunks: Rows, budget: int) -> None:
        """Admit groups in order while rows, tokens and blocks last."""
        while budget > 0 and (group := self._next_to_admit()) is not None:
            if self._groups.num_reserved_rows + group.width > self._config.max_num_seqs:
                return
            if group.has_draws_in_flight:
                return  # preempted while a step that draws its next token is running
            if group.status is GroupStatus.SWAPPED:
                # With running groups but no rows there would be no step to carry it out before one of them needs the room.
                if (self._groups.running and not decodes and not chunks) or not self._swap_in(group):
                    return
                continue  # its rows come with the next step, which is free to preempt
            free_blocks = self._blocks.num_free_blocks
            if self._groups.running and self._refused_at is not None:
                refused, free_then = self._refused_at
                if refused is group and free_blocks <= free_then:
                    return  # matching its prefix again would cost its length every step, for nothing
            seq = group.begin()
            num_tokens = len(seq.token_ids)
            self._blocks.add(seq.seq_id)
            cached = 0
            # The last token is always computed: its logits are what the sequence waits for.
            most_cached = min(num_tokens - 1, group.num_cacheable_tokens)
            if self._config.enable_prefix_caching and most_cached > 0:
                cached = self._blocks.match_prefix(seq.seq_id, seq.token_ids, most_cached, seq.request.cache_salt)
            cached = self._pinned.attach(seq, cached)
            query_len = min(num_tokens - cached, budget)
            if query_len < num_tokens - cached and not self._config.enable_chunked_prefill:
                self._blocks.release(seq.seq_id)
                return
            if not self._has_room(group, seq, cached):
                self._blocks.release(seq.seq_id)
                self._refused_at = (group, free_blocks)
                return
            self._refused_at = None
            if group.status is GroupStatus.WAITING:
                group.num_cached_tokens = cached
                self.num_prefix_queries += num_tokens if group.num_cacheable_tokens > 0 else 0
                self.num_prefix_hits += cached
            seq.num_computed_tokens = cached
            self._groups.start(group)
            budget -= query_len
            (decodes if query_len == 1 else chunks).add(seq, query_len)

    def _next_to_admit(self) -> SequenceGroup | None:
        """The first of the preempted groups, unless a more urgent one waits."""
        waiting = self._groups.waiting.peek()
        if self._groups.preempted and (waiting is None or self._groups.preempted[0].priority <= waiting.priority):
            return self._groups.preempted[0]
        return waiting

    def _swap_in(self, group: SequenceGroup) -> bool:
        """Bring a group's blocks back, if there is room for them and for going on."""
        wanted = group.num_swapped_blocks + group.blocks_to_go_on(self._blocks) + self._watermark_blocks
        if self._groups.running and wanted > self._blocks.num_free_blocks:
            return False
        if not self._swap_space.swap_in(group):
            if not self._groups.running:
                self._groups.restart(group)  # what it shared with pinned prefixes has become its own, and is too much
            return False
        self._groups.start(group)
        return True

    def _has_room(self, group: SequenceGroup, sequence: Sequence, cached: int) -> bool:
        """Take all blocks the policy wants, at least for the tokens there are: a group is admitted whole or not at all."""
        if not self._blocks.grow(sequence.seq_id, self._policy.tokens_to_hold(sequence), cached):
            return False
        return not self._groups.running or (
            self._blocks.num_free_blocks >= self._watermark_blocks + group.blocks_to_branch(self._blocks)
        )
