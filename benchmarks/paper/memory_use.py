"""What the slots of a K/V pool hold at a moment (figure 2), and means of it over time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagedcore.engine.scheduler import Scheduler
from pagedcore.engine.sequence import Sequence


@dataclass(frozen=True)
class MemoryUse:
    """Slots by what is in them; they add up to the pool.

    token_states: K/V of tokens. reserved: held by a sequence that will use them later. internal: held by a sequence that
    never will. external: lost to rounding, or free and yet of no use to the request that waits. idle: free, nobody waits.
    """

    token_states: float = 0.0
    reserved: float = 0.0
    internal: float = 0.0
    external: float = 0.0
    idle: float = 0.0

    @property
    def held(self) -> float:
        """Slots that sequences have, whether they use them or not."""
        return self.token_states + self.reserved + self.internal

    @property
    def total(self) -> float:
        return self.held + self.external + self.idle

    def percent(self) -> MemoryUse:
        """Each kind but idle in percent of what is not idle."""
        scale = 100 / (self.total - self.idle)
        return MemoryUse(self.token_states * scale, self.reserved * scale, self.internal * scale, self.external * scale)

    def plus(self, other: MemoryUse, weight: float) -> MemoryUse:
        return MemoryUse(
            self.token_states + weight * other.token_states,
            self.reserved + weight * other.reserved,
            self.internal + weight * other.internal,
            self.external + weight * other.external,
            self.idle + weight * other.idle,
        )


@dataclass(frozen=True)
class PagedWaste:
    """Slots of a paged pool that hold no K/V of a running sequence, by why that is so.

    last_block: the empty rest of each sequence's last block. ahead: further slots it holds, for later chunks of its prompt.
    The rest is free while a request waits. margin: what admission leaves free. returning: beyond that, while a preempted
    request lacks room for all its tokens. new: beyond it, while the first request that waits lacks room for its prompt.
    """

    last_block: float = 0.0
    ahead: float = 0.0
    margin: float = 0.0
    returning: float = 0.0
    new: float = 0.0

    def plus(self, other: PagedWaste, weight: float) -> PagedWaste:
        return PagedWaste(
            self.last_block + weight * other.last_block,
            self.ahead + weight * other.ahead,
            self.margin + weight * other.margin,
            self.returning + weight * other.returning,
            self.new + weight * other.new,
        )


def classify(
    num_computed: list[int], final_lens: list[int], held: list[int], num_taken: int, num_free: int, anyone_waits: bool
) -> MemoryUse:
    """The use of a pool by sequences that share nothing; all arguments in slots.

    num_computed, final_lens, held: for each sequence, the tokens it has K/V of, those it will have in the end, and the slots
    it asked for. num_taken: slots not free, which is more than `held` where requests are rounded up.
    """
    computed, final, room = (np.asarray(values, dtype=np.int64) for values in (num_computed, final_lens, held))
    states, room_total = int(computed.sum()), int(room.sum())
    used_in_the_end = int(np.minimum(room, final).sum())
    return MemoryUse(
        token_states=states,
        reserved=used_in_the_end - states,
        internal=room_total - used_in_the_end,
        external=num_taken - room_total + (num_free if anyone_waits else 0),
        idle=0 if anyone_waits else num_free,
    )


def output_len(sequence: Sequence) -> int:
    """How long the sequence's output will be; every simulated request knows."""
    length = sequence.request.expected_output_len
    assert length is not None
    return length


def anyone_waits(scheduler: Scheduler) -> bool:
    """Whether a request, new or preempted, wants to be admitted."""
    return bool(scheduler.waiting or scheduler.preempted)


def measure(scheduler: Scheduler) -> MemoryUse:
    """The use of a scheduler's pool now. Nothing may be shared (prefix cache, samples): it would be counted twice."""
    blocks, policy = scheduler.blocks, scheduler.policy
    running = [seq for group in scheduler.running for seq in group.active]
    size = blocks.block_size
    computed = [seq.num_computed_tokens for seq in running]
    if policy.is_paged:
        held = [len(blocks.block_table(seq.seq_id)) * size for seq in running]
    else:
        held = [policy.tokens_to_hold(seq) for seq in running]
    return classify(
        computed,
        [seq.num_prompt_tokens + output_len(seq) for seq in running],
        held,
        num_taken=(blocks.num_blocks - blocks.num_free_blocks) * size,
        num_free=blocks.num_free_blocks * size,
        anyone_waits=anyone_waits(scheduler),
    )


def measure_waste(scheduler: Scheduler) -> PagedWaste:
    """The waste in a paged scheduler's pool now. Nothing may be shared, as for `measure`."""
    blocks = scheduler.blocks
    size = blocks.block_size
    running = [seq for group in scheduler.running for seq in group.active]
    last_block = sum(-seq.num_computed_tokens % size for seq in running)
    held = sum(len(blocks.block_table(seq.seq_id)) * size - seq.num_computed_tokens for seq in running)
    free = blocks.num_free_blocks if anyone_waits(scheduler) else 0
    margin = min(free, int(blocks.num_blocks * scheduler.config.watermark))
    beyond = (free - margin) * size
    return PagedWaste(
        last_block=last_block,
        ahead=held - last_block,
        margin=margin * size,
        returning=beyond if scheduler.preempted else 0,
        new=0 if scheduler.preempted else beyond,
    )
