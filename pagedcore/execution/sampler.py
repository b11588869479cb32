"""From a step's logits to its tokens: biases, penalties and bans, the draw, and log probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagedcore import ops
from pagedcore.engine.sampling_extras import (
    EXTRAS_HEADER_SIZE,
    NUM_PENALTY_COLUMNS,
    ExtrasHeader,
    PenaltyColumn,
)
from pagedcore.engine.step_plan import NUM_SAMPLING_COLUMNS, Header, StepLayout, StepResult


@dataclass(frozen=True)
class SampledTokens:
    """What a step drew, on the device; fields as in `StepResult`."""

    token_ids: torch.Tensor  # [num_rows] int32, -1 in a row whose logits were not finite
    chosen_logprobs: torch.Tensor | None = None  # [num_rows] float32
    chosen_ranks: torch.Tensor | None = None  # [num_rows] int32
    top_logprobs: torch.Tensor | None = None  # [num_rows, k] float32
    top_token_ids: torch.Tensor | None = None  # [num_rows, k] int32

    def to_result(self) -> StepResult:
        """Copy to the host; waits for the device."""
        if self.chosen_logprobs is None:
            return StepResult(self.token_ids.cpu().numpy())
        assert self.chosen_ranks is not None and self.top_logprobs is not None and self.top_token_ids is not None
        return StepResult(
            self.token_ids.cpu().numpy(),
            self.chosen_logprobs.cpu().numpy(),
            self.chosen_ranks.cpu().numpy(),
            self.top_logprobs.cpu().numpy(),
            self.top_token_ids.cpu().numpy(),
        )


@dataclass(frozen=True)
class Extras:
    """Views of the extras of a step's packed buffer; `pagedcore/engine/sampling_extras.py` describes the sections."""

    rows: torch.Tensor  # [P] int64
    penalties: torch.Tensor  # [P, 8] float32: the bit patterns of `PenaltyColumn`
    prompt_lens: torch.Tensor  # [P] int64
    output_lens: torch.Tensor  # [P] int64
    prompt_tokens: torch.Tensor  # [A] int64
    output_tokens: torch.Tensor  # [B] int64, negative: in flight
    biases: torch.Tensor  # [D, 3] int32; the last column's bit patterns are floats
    allowed_rows: torch.Tensor  # [E, 2] int64
    allowed_tokens: torch.Tensor  # [F] int64
    bans: torch.Tensor  # [C, 3] int64

    @classmethod
    def from_buffer(cls, extras: torch.Tensor, host_extras: torch.Tensor) -> Extras:
        """Read the extras section (int32) of a step's packed buffer; `host_extras` is the same on the CPU."""
        header = ExtrasHeader(*host_extras[: len(ExtrasHeader._fields)].tolist())
        sizes = [
            EXTRAS_HEADER_SIZE,
            header.num_penalty_rows * NUM_PENALTY_COLUMNS,
            header.num_prompt_tokens,
            header.num_output_tokens,
            header.num_biases * 3,
            header.num_allowed_rows * 2,
            header.num_allowed_tokens,
            header.num_bans * 3,
        ]
        _, table, prompt_tokens, output_tokens, biases, allowed_rows, allowed, bans = torch.split(extras, sizes)
        table = table.view(-1, NUM_PENALTY_COLUMNS)
        return cls(
            rows=table[:, PenaltyColumn.ROW].long(),
            penalties=table.view(torch.float32),
            prompt_lens=table[:, PenaltyColumn.NUM_PROMPT_TOKENS].long(),
            output_lens=table[:, PenaltyColumn.NUM_OUTPUT_TOKENS].long(),
            prompt_tokens=prompt_tokens.long(),
            output_tokens=output_tokens.long(),
            biases=biases.view(-1, 3),
            allowed_rows=allowed_rows.view(-1, 2).long(),
            allowed_tokens=allowed.long(),
            bans=bans.view(-1, 3).long(),
        )


class Sampler:
    """Draws a token for each row of a step. It has no state: a draw depends on the row's logits, parameters and history."""

    def __call__(
        self,
        logits: torch.Tensor,
        buffer: torch.Tensor,
        header: Header,
        input_ids: torch.Tensor,
        host_buffer: torch.Tensor | None = None,
    ) -> SampledTokens:
        """Draw the tokens of a step.

        logits: [num_rows, vocab_size] float32 of each row's last token; may be overwritten.
        buffer: int32, the step's packed buffer, and `header` its header.
        input_ids: [num_tokens] the step's input ids, none of them negative.
        host_buffer: where the buffer is on a GPU, the same on the CPU, so that nobody need ask the GPU for sizes.
        Log probabilities are of the model's own distribution, before biases, penalties, bans and temperature.
        """
        layout = StepLayout(header.num_tokens, header.num_rows, header.table_width)
        parameters = buffer[layout.sampling : layout.copies].view(header.num_rows, NUM_SAMPLING_COLUMNS)
        wants_logprobs = header.max_logprobs >= 0
        processed = logits
        if header.num_extras:
            processed = logits.clone() if wants_logprobs else logits
            section = slice(header.extras_offset, header.extras_offset + header.num_extras)
            extras = Extras.from_buffer(buffer[section], (buffer if host_buffer is None else host_buffer)[section])
            last_positions = buffer[layout.query_start_loc + 1 : layout.seq_lens] - 1
            apply_extras(processed, extras, input_ids.index_select(0, last_positions))
        token_ids = ops.sample(processed, parameters)
        if not wants_logprobs:
            return SampledTokens(token_ids)
        return SampledTokens(token_ids, *ops.logprobs(logits, token_ids, header.max_logprobs))


def apply_extras(logits: torch.Tensor, extras: Extras, last_input_ids: torch.Tensor) -> None:
    """Apply biases, penalties, allowed tokens and bans to the logits, in this order and in place.

    logits: [num_rows, vocab_size] float32. last_input_ids: [num_rows] the last input token of each row.
    Does not wait for the device.
    """
    last_input_ids = last_input_ids.long()
    if len(extras.biases):
        _add_biases(logits, extras)
    if len(extras.rows):
        _penalize(logits, extras, last_input_ids)
    if len(extras.allowed_rows):
        _keep_allowed(logits, extras)
    if len(extras.bans):
        _ban(logits, extras, last_input_ids)


def _add_biases(logits: torch.Tensor, extras: Extras) -> None:
    rows, tokens = extras.biases[:, 0].long(), extras.biases[:, 1].long()
    logits.index_put_((rows, tokens), extras.biases.view(torch.float32)[:, 2], accumulate=True)


def _penalize(logits: torch.Tensor, extras: Extras, last_input_ids: torch.Tensor) -> None:
    """The repetition penalty (CTRL, Keskar et al. 2019, section 4.1; negative logits are multiplied) looks at prompt and
    output; presence and frequency penalties look at the output.

    A token that occurs more than once is read each time before any is written, so each occurrence writes the same value.
    """
    owners = torch.arange(len(extras.rows), device=logits.device)
    prompt_owners = owners.repeat_interleave(extras.prompt_lens, output_size=len(extras.prompt_tokens))
    output_owners = owners.repeat_interleave(extras.output_lens, output_size=len(extras.output_tokens))
    output_rows = extras.rows[output_owners]
    output_tokens = torch.where(extras.output_tokens < 0, last_input_ids[output_rows], extras.output_tokens)

    seen_owners = torch.cat([prompt_owners, output_owners])
    seen = (extras.rows[seen_owners], torch.cat([extras.prompt_tokens, output_tokens]))
    values = logits[seen]
    repetition = extras.penalties[seen_owners, PenaltyColumn.REPETITION]
    logits[seen] = torch.where(values > 0, values / repetition, values * repetition)

    output = (output_rows, output_tokens)
    logits[output] = logits[output] - extras.penalties[output_owners, PenaltyColumn.PRESENCE]
    logits.index_put_(output, -extras.penalties[output_owners, PenaltyColumn.FREQUENCY], accumulate=True)


def _keep_allowed(logits: torch.Tensor, extras: Extras) -> None:
    rows, counts = extras.allowed_rows[:, 0], extras.allowed_rows[:, 1]
    allowed = (rows.repeat_interleave(counts, output_size=len(extras.allowed_tokens)), extras.allowed_tokens)
    kept = logits[allowed]
    logits[rows] = -torch.inf
    logits[allowed] = kept


def _ban(logits: torch.Tensor, extras: Extras, last_input_ids: torch.Tensor) -> None:
    rows, tokens, after = extras.bans.unbind(dim=1)
    applies = (after < 0) | (after == last_input_ids[rows])
    # Added up, as a token may be banned both after a certain one and always.
    change = torch.where(applies, -torch.inf, 0.0)
    logits.index_put_((rows, tokens), change, accumulate=True)
