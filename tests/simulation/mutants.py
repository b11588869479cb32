"""Faults to plant in the engine's Python, one at a time: the simulation must find every one of them.

A mutant is a piece of a source file, which must be in it exactly once, and what takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`file` is relative to pagedcore/; `what` says what is wrong.

    `near`: a seed shortly before one that finds it, for those that are rarely found: tests begin there.
    """

    what: str
    file: str
    old: str
    new: str
    near: int = 0


PYTHON_MUTANTS = (
    Mutant("steps compute more than their budget", "engine/scheduler.py", "budget -= pending", "budget -= 1"),
    Mutant(
        "blocks to be written are not made the sequence's own",
        "engine/scheduler.py",
        "ends[done:], starts[done:])",
        "ends[done:], ends[done:])",
    ),
    Mutant(
        "a preempted group keeps rows in the step",
        "engine/scheduler.py",
        "while sequences and sequences[-1].group is victim:",
        "if sequences and sequences[-1].group is victim:",
    ),
    Mutant("too many rows run", "engine/admission.py", "if self._groups.num_reserved_rows + group", "if group"),
    Mutant(
        "a cached prompt leaves no token to compute",
        "engine/admission.py",
        "min(num_tokens - 1, group.num_cacheable_tokens)",
        "min(num_tokens, group.num_cacheable_tokens)",
    ),
    Mutant(
        "cached tokens are computed from the wrong place on",
        "engine/admission.py",
        "seq.num_computed_tokens = cached",
        "seq.num_computed_tokens = max(cached - 1, 0)",
    ),
    Mutant(
        "what a preempted group has computed is not forgotten",
        "engine/lifecycle.py",
        "        if status is GroupStatus.PREEMPTED:\n            group.restart()\n",
        "        if status is GroupStatus.PREEMPTED:\n",
        near=230,
    ),
    Mutant(
        "only the first block table of a group is released",
        "engine/lifecycle.py",
        "for seq_id in group.table_ids:",
        "for seq_id in group.table_ids[:1]:",
    ),
    Mutant(
        "double free: an ended sequence stays in its group",
        "engine/lifecycle.py",
        "        group.sequences.remove(seq)\n",
        "",
    ),
    Mutant(
        "blocks of an ended sequence are still copied in",
        "engine/lifecycle.py",
        "        self.restart_if_moving(group)\n",
        "",
        near=1280,
    ),
    Mutant(
        "rows of a group are given back once, however many there are",
        "engine/lifecycle.py",
        "self.num_reserved_rows -= group.width",
        "self.num_reserved_rows -= 1",
    ),
    Mutant(
        "stale result: what a failed step drew counts after the restart",
        "engine/lifecycle.py",
        "            seq.valid_from = group.restarted_at\n",
        "",
        near=230,
    ),
    Mutant(
        "unwritten blocks are registered after a preemption",
        "engine/step_results.py",
        "group.status is GroupStatus.RUNNING and step_id >= group.started_at",
        "group.status is GroupStatus.RUNNING",
        near=1150,
    ),
    Mutant(
        "a block is registered one token before it is full",
        "engine/step_results.py",
        "if end // block_size > start // block_size and _has_computed(group, step_id):\n"
        "                self._blocks.commit(seq.seq_id, seq.token_ids, end)",
        "if _has_computed(group, step_id):\n                self._blocks.commit(seq.seq_id, seq.token_ids, end + 1)",
    ),
    Mutant(
        "rows with bad logits go on",
        "engine/step_results.py",
        "if token < 0:",
        "if token < -1:",
    ),
    Mutant(
        "one token more than allowed",
        "engine/step_results.py",
        "len(seq.token_ids) >= seq.max",
        "len(seq.token_ids) > seq.max",
    ),
    Mutant(
        "a step that failed behind another one is not taken back",
        "engine/engine.py",
        "            self.scheduler.retry_step(plan)\n",
        "",
        near=332,
    ),
    Mutant(
        "a group whose swap failed half way goes on",
        "engine/step_results.py",
        "        self._restart_swapped(plan)\n        return outputs",
        "        return outputs",
        near=221,
    ),
    Mutant(
        "missing last output: a failed request is told, but not that it has ended",
        "engine/step_results.py",
        "FinishReason.ERROR, error=error, request_finished=True)",
        "FinishReason.ERROR, error=error)",
    ),
    Mutant(
        "stale row of sampling parameters",
        "engine/step_packer.py",
        "row[:] = pack",
        "row[:] = row if row.any() else pack",
    ),
    Mutant(
        "rows of sampling parameters are not given back",
        "engine/step_packer.py",
        "        self._free_slots.append(sequence.slot)\n",
        "",
    ),
    Mutant(
        "sampling parameters of another row",
        "engine/step_packer.py",
        "[seq.slot for seq in sequences]",
        "[seq.slot for seq in reversed(sequences)]",
    ),
    Mutant(
        "draw index off by one",
        "engine/step_packer.py",
        "draws.append(total - seq.num_prompt_tokens)",
        "draws.append(len(seq.token_ids) - seq.num_prompt_tokens)",
    ),
    Mutant(
        "a step's buffer is filled while the step before reads it",
        "engine/step_packer.py",
        "self._buffers[self.num_steps % len(self._buffers)]",
        "self._buffers[0]",
    ),
    Mutant(
        "the next input is taken from an old row",
        "engine/step_packer.py",
        "                seq.last_row = row\n",
        "                seq.last_row = max(seq.last_row, row)\n",
    ),
    Mutant(
        "the last block of a step's swaps is lost",
        "engine/step_packer.py",
        "buffer[count] = len(pairs)",
        "buffer[count] = max(len(pairs) - 1, 0)",
    ),
    Mutant(
        "blocks of a released group are still copied in",
        "engine/swap_space.py",
        "        self._in = [move for move in self._in if move.group is not group]\n",
        "",
        near=4232,
    ),
    Mutant(
        "blocks come in from the wrong places",
        "engine/swap_space.py",
        "[(host, device) for device, host in pairs]",
        "[(pairs[i - 1][1], device) for i, (device, _) in enumerate(pairs)]",
    ),
    Mutant(
        "sequences of a group draw alike",
        "engine/sequence_group.py",
        "mix_seed(self.lead.seed, index)",
        "mix_seed(self.lead.seed, 1)",
    ),
    Mutant(
        "one token too many is taken to be common",
        "engine/sequence_group.py",
        "return int(differences[0]) if",
        "return int(differences[0]) + 1 if",
    ),
    Mutant(
        "beams go on with each other's tokens",
        "engine/sequence_group.py",
        "zip(going_on, continuations, strict=True)",
        "zip(going_on, reversed(continuations), strict=True)",
    ),
    Mutant(
        "a pinned prefix is taken for another one",
        "engine/pinned_prefixes.py",
        "token_ids[:length] == prefix.token_ids",
        "True",
    ),
    Mutant("salted requests use pinned prefixes", "engine/pinned_prefixes.py", "if request.cache_salt or", "if"),
    Mutant(
        "the last to come is the first to be admitted",
        "engine/fair_queue.py",
        "next(iter(self.waiting))",
        "next(reversed(self.waiting))",
    ),
    Mutant(
        "the least urgent are admitted first",
        "engine/waiting_queue.py",
        "heapq.heappush(self._priorities, group.priority)",
        "self._priorities.append(group.priority)",
    ),
    Mutant(
        "tokens of cancelled requests wait for ever",
        "engine/waiting_queue.py",
        "            self._length -= 1\n            self.num_tokens -= group.num_prompt_tokens\n",
        "            self._length -= 1\n",
    ),
    Mutant(
        "lost cancel: none is heard while a step runs",
        "engine/engine_thread.py",
        "        self._post_unless_dead(_Abort(request_id, self._clock()))",
        "        self._busy or self._post_unless_dead(_Abort(request_id, self._clock()))",
    ),
    Mutant(
        "a late request is answered and goes on",
        "engine/engine_thread.py",
        "            self._post_unless_dead(_Abort(request_id, self._clock(), has_expired=True))\n",
        "",
    ),
    Mutant(
        "the end of a late request reaches the next one of the same id",
        "engine/open_requests.py",
        " or request_id in self._expired:",
        ":",
        near=172,
    ),
    Mutant(
        "an ended request hears of the engine's end",
        "engine/open_requests.py",
        "self._sinks.pop if output.request_finished else self._sinks.get",
        "self._sinks.get",
    ),
    Mutant(
        "a cached prompt is not asked how likely it was",
        "engine/admission.py",
        "min(num_tokens - 1, group.num_cacheable_tokens)",
        "num_tokens - 1",
    ),
    Mutant(
        "a pinned prefix is not asked how likely it was",
        "engine/pinned_prefixes.py",
        "if request.cache_salt or request.sampling_params.prompt_logprobs is not None:",
        "if request.cache_salt:",
    ),
    Mutant(
        "a prompt token is said to be as likely as the one behind it",
        "engine/step_packer.py",
        "sources += range(index + begin - 1 - start, index + end - 1 - start)",
        "sources += range(index + begin - start, index + end - start)",
    ),
    Mutant(
        "what a step that is taken back says of a prompt counts",
        "engine/step_results.py",
        "wanted = group.prompt_logprobs if _concerns(plan, group) else None",
        "wanted = group.prompt_logprobs",
    ),
    Mutant(
        "prompts go on whose logits are bad",
        "engine/logprobs.py",
        "if not np.isfinite(arrays.chosen_logprobs[source]).all():",
        "if not np.isfinite(arrays.chosen_logprobs[source]).any():",
    ),
    Mutant(
        "how likely the prompt was is told with every output",
        "engine/sequence_group.py",
        "told, self.prompt_logprobs = self.prompt_logprobs, None",
        "told = self.prompt_logprobs",
    ),
    Mutant("deadlines pass unnoticed", "engine/deadlines.py", "if at > self._clock():", "if at + 3 > self._clock():"),
)
