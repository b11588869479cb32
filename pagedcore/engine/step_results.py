"""What becomes of a launched step: its tokens are taken over, or it has failed."""

from __future__ import annotations

from pagedcore._core import BlockManager
from pagedcore.engine.clock import Clock
from pagedcore.engine.lifecycle import GroupLifecycle
from pagedcore.engine.logprobs import StepLogprobs, TokenLogprobs
from pagedcore.engine.outputs import TokenOutput, final_output, ranked_outputs
from pagedcore.engine.sequence import NEVER, FinishReason, Sequence
from pagedcore.engine.sequence_group import GroupStatus, SequenceGroup
from pagedcore.engine.step_packer import StepPacker
from pagedcore.engine.step_plan import StepPlan, StepResult
from pagedcore.engine.telemetry import Recorder, StepTimes
from pagedcore.errors import NonFiniteLogitsError


class StepResults:
    """Appends what steps drew, registers full blocks, ends sequences and says what there is to say about all that."""

    def __init__(
        self,
        blocks: BlockManager,
        packer: StepPacker,
        groups: GroupLifecycle,
        recorder: Recorder | None,
        clock: Clock,
    ) -> None:
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._blocks = blocks
        self._packer = packer
        self._groups = groups
        self._recorder = recorder
        self._clock = clock
        self._committed_at = -1.0  # when the step before was taken over; before the first one, no sequence's `token_at`

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Take over what a step drew: append, register full blocks, finish. Rows of sequences that ended meanwhile are dropped."""
        outputs: list[TokenOutput] = []
        token_ids = result.token_ids.tolist()
        step_logprobs = StepLogprobs(result) if result.chosen_logprobs is not None else None
        block_size = self._blocks.block_size
        step_id = plan.step_id
        committed_at, now = self._committed_at, self._clock()
        times = StepTimes(now, now - committed_at)
        num_drawn = 0
        for row in plan.beam_rows:
            if token_ids[row] < 0 and step_id >= plan.sequences[row].valid_from:
                outputs.append(self._fail_bad_logits(plan.sequences[row].group))
        if plan.prompt_spans:
            outputs += self._take_prompt_logprobs(plan, result)
        for row, (seq, start, n, samples) in enumerate(
            zip(plan.sequences, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.samples, strict=True)
        ):
            if step_id < seq.valid_from:
                continue
            seq.num_in_flight -= samples
            token = token_ids[row]
            group = seq.group
            if token < 0:  # its K/V may be as bad as its logits, also where none is drawn: nothing of it is registered
                outputs.append(self._fail_bad_logits(group))
                continue
            end = start + n
            if end // block_size > start // block_size and _has_computed(group, step_id):
                self._blocks.commit(seq.seq_id, seq.token_ids, end)
            if not samples:
                continue
            seq.token_ids.append(token)
            num_drawn += 1
            if seq.token_at != committed_at:  # else it drew in the step before, as nearly all do
                times.add_irregular(seq)
            seq.token_at = now
            reason = None
            if token in seq.stop_token_ids:
                reason = FinishReason.STOP
            elif len(seq.token_ids) >= seq.max_total_tokens:
                reason = FinishReason.LENGTH
            if reason is None and group.is_plain:
                outputs.append(TokenOutput(group.request_id, seq.index, [token]))
            else:
                outputs += self._outputs(seq, row, token, reason, step_logprobs)
        for row in plan.beam_rows:
            if step_id >= plan.sequences[row].valid_from:
                outputs += self._take_beam(plan.sequences[row], row, result, times)
        self._committed_at = now
        self.num_generated_tokens += num_drawn
        self.num_prompt_tokens += times.num_prompt_tokens
        if self._recorder is not None:
            self._recorder.add_step(times.record(sum(plan.num_scheduled_tokens), num_drawn))
        return outputs

    def _take_prompt_logprobs(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Take over what a step says of prompts; a group whose logits were not finite there fails."""
        assert result.prompt_logprobs is not None
        outputs: list[TokenOutput] = []
        at = 0
        for group, begin, end in plan.prompt_spans:
            wanted = group.prompt_logprobs if _concerns(plan, group) else None
            if wanted is not None and not wanted.take(begin, end, result.prompt_logprobs, at):
                outputs.append(self._fail_bad_logits(group))
            at += end - begin
        return outputs

    def _take_beam(self, beam: Sequence, row: int, result: StepResult, times: StepTimes) -> list[TokenOutput]:
        """Take over what a beam's step says of its next token; with the last beam of the group, choose how they go on."""
        group = beam.group
        search = group.search
        assert search is not None and result.top_token_ids is not None and result.top_logprobs is not None
        beam.awaits_choice = False
        times.add_beam(beam)
        candidates = slice(search.num_candidates)
        search.take(beam, result.top_token_ids[row, candidates], result.top_logprobs[row, candidates])
        if not search.is_complete(group.sequences):
            return []
        continuations = search.choose(group.sequences)
        if not continuations:
            self._groups.end_group(group, search.ended[0].reason)
            return ranked_outputs(group)
        self.num_generated_tokens += len(continuations)
        change = group.replace_beams(continuations, self._groups.new_seq_id)
        for parent, child in change.forked:
            self._blocks.fork(parent.seq_id, child.seq_id)
        for dropped in change.dropped:
            dropped.valid_from = NEVER
            self._blocks.release(dropped.seq_id)
        if group.status is GroupStatus.RUNNING:
            for dropped in change.dropped:
                self._packer.remove(dropped)
            for _, child in change.forked:
                self._packer.add(child, group.num_logprobs)
        if change.dropped:
            self._groups.restart_if_moving(group)
        return []

    def _outputs(
        self, seq: Sequence, row: int, token: int, reason: FinishReason | None, step_logprobs: StepLogprobs | None
    ) -> list[TokenOutput]:
        """End the sequence if there is a reason to, and say what there is to say: nothing yet, where outputs are ranked."""
        group = seq.group
        logprobs: list[TokenLogprobs] = []
        if group.num_logprobs >= 0:
            assert step_logprobs is not None
            logprobs.append(step_logprobs.of_row(row, group.num_logprobs))
            seq.cumulative_logprob += logprobs[0].logprob
        if group.ranks_outputs:
            seq.logprobs += logprobs
        outputs: list[TokenOutput] = []
        if reason is not None:
            self._groups.end_sequence(seq, reason)
            outputs = self._final_outputs(seq, [token], logprobs)
        elif not group.ranks_outputs:
            outputs = [TokenOutput(group.request_id, seq.index, [token], logprobs=logprobs or None)]
        return _with_prompt_logprobs(group, outputs)

    def end_sequence(self, sequence: Sequence) -> list[TokenOutput]:
        """End one unfinished sequence of a group, with the reason STOP."""
        self._groups.end_sequence(sequence, FinishReason.STOP)
        return _with_prompt_logprobs(sequence.group, self._final_outputs(sequence, [], []))

    def _final_outputs(self, seq: Sequence, token_ids: list[int], logprobs: list[TokenLogprobs]) -> list[TokenOutput]:
        """The last message of a sequence that has ended, with these new tokens; of ranked outputs, all messages at the end."""
        group = seq.group
        finished = group.status is GroupStatus.FINISHED
        if not group.ranks_outputs:
            return [final_output(seq, token_ids, logprobs, request_finished=finished)]
        group.held.append(seq)
        return ranked_outputs(group) if finished else []

    def _fail_bad_logits(self, group: SequenceGroup) -> TokenOutput:
        return self.fail(group, NonFiniteLogitsError("the model's logits for this request were not finite"))

    def fail(self, group: SequenceGroup, error: Exception) -> TokenOutput:
        """End an unfinished group because of `error`."""
        self._groups.abort(group, FinishReason.ERROR)
        return TokenOutput(group.request_id, 0, [], FinishReason.ERROR, error=error, request_finished=True)

    def fail_step(self, plan: StepPlan, error: Exception) -> list[TokenOutput]:
        """End every group that the step was to compute; those it was only to swap are recomputed, the others go on."""
        outputs = [self.fail(group, error) for group in _unfinished_groups(plan)]
        self._restart_swapped(plan)
        return outputs

    def retry_step(self, plan: StepPlan) -> None:
        """Take back a step that failed through no fault of its unfinished groups: they are recomputed."""
        for group in _unfinished_groups(plan):
            self._groups.restart(group)
        self._restart_swapped(plan)

    def _restart_swapped(self, plan: StepPlan) -> None:
        for group in plan.swapped:
            if _concerns(plan, group):
                self._groups.restart(group)


def _with_prompt_logprobs(group: SequenceGroup, outputs: list[TokenOutput]) -> list[TokenOutput]:
    """Outputs of a group, the first of which tells what is to be told of its prompt."""
    if outputs and group.prompt_logprobs is not None:
        outputs[0].prompt_logprobs = group.tell_prompt_logprobs()
    return outputs


def _has_computed(group: SequenceGroup, step_id: int) -> bool:
    """Whether what the step computed is in the blocks that the group has now: it may have been preempted meanwhile."""
    return group.status is GroupStatus.RUNNING and step_id >= group.started_at


def _unfinished_groups(plan: StepPlan) -> list[SequenceGroup]:
    """The groups that the step still concerns."""
    groups = dict.fromkeys(seq.group for seq in plan.sequences)
    return [group for group in groups if _concerns(plan, group)]


def _concerns(plan: StepPlan, group: SequenceGroup) -> bool:
    """Whether the group is still there and has not been restarted since the step was planned."""
    return group.status is not GroupStatus.FINISHED and plan.step_id >= group.restarted_at
