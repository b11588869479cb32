"""A step's packed buffer as the tensors the model reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagedcore.engine.step_plan import Header, StepLayout
from pagedcore.layers.attention import AttentionInputs


@dataclass(frozen=True)
class BatchInputs:
    """One step on the device, in memory that the next step overwrites."""

    header: Header
    layout: StepLayout
    buffer: torch.Tensor  # [used] int32: the packed form as it came
    packed: torch.Tensor  # int32: its front, up to the block tables
    block_tables: torch.Tensor  # [max_rows, max_table_width] int32
    token_ids: torch.Tensor  # [num_tokens] int32, none negative
    last_positions: torch.Tensor  # [num_rows] int32: index of each row's last token

    @property
    def is_decode(self) -> bool:
        """Whether every row computes one token, so that the step's shape is its number of rows."""
        return self.header.is_decode

    @property
    def positions(self) -> torch.Tensor:
        """[num_tokens] int32."""
        return self.packed[self.layout.positions : self.layout.slot_mapping]

    def attention(self) -> AttentionInputs:
        """What attention reads: the same addresses for every step of equal shape."""
        packed, layout = self.packed, self.layout
        return AttentionInputs(
            positions=self.positions,
            slot_mapping=packed[layout.slot_mapping : layout.query_start_loc],
            query_start_loc=packed[layout.query_start_loc : layout.seq_lens],
            seq_lens=packed[layout.seq_lens : layout.block_tables],
            block_tables=self.block_tables[: self.header.num_rows],
            max_query_len=self.header.max_query_len,
        )


def block_copies(buffer: torch.Tensor, header: Header) -> torch.Tensor:
    """[num_copies, 2] int32 in a step's packed buffer: source block, destination block."""
    begin = StepLayout(header.num_tokens, header.num_rows, header.table_width).copies
    return buffer[begin : begin + 2 * header.num_copies].view(-1, 2)


def block_swaps(buffer: torch.Tensor, header: Header) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_swap_outs, 2] and [num_swap_ins, 2] int32 in a step's packed buffer: source block, destination block."""
    begin = StepLayout(header.num_tokens, header.num_rows, header.table_width).copies + 2 * header.num_copies
    middle = begin + 2 * header.num_swap_outs
    end = middle + 2 * header.num_swap_ins
    return buffer[begin:middle].view(-1, 2), buffer[middle:end].view(-1, 2)


class InputBuffers:
    """The memory where the model finds each step's inputs: at the same addresses for every step of equal shape.

    That keeps captured graphs valid. Block tables are given the width of the longest sequence for the same reason.
    """

    def __init__(self, max_tokens: int, max_rows: int, table_width: int, device: torch.device) -> None:
        size = StepLayout(max_tokens, max_rows, table_width).block_tables
        self._packed = torch.zeros(size, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(max_rows, table_width, dtype=torch.int32, device=device)

    @property
    def num_bytes(self) -> int:
        return self._packed.nbytes + self._block_tables.nbytes

    def load(self, buffer: torch.Tensor, last_token_ids: torch.Tensor) -> BatchInputs:
        """Take over a packed buffer, int32, filled by `StepLayout`.

        last_token_ids: [max_rows] int32, what the previous step drew, by row; an id -1 - r in the buffer stands for
        last_token_ids[r].
        """
        header = Header(*buffer[: len(Header._fields)].tolist())
        num_rows, width = header.num_rows, header.table_width
        layout = StepLayout(header.num_tokens, num_rows, width)
        end = layout.block_tables
        packed = self._packed[:end]
        packed.copy_(buffer[:end])
        self._block_tables[:num_rows, :width].copy_(buffer[end : layout.sampling].view(num_rows, width))
        return BatchInputs(
            header=header,
            layout=layout,
            buffer=buffer,
            packed=packed,
            block_tables=self._block_tables,
            token_ids=_resolve(packed[layout.token_ids : layout.positions], last_token_ids),
            last_positions=packed[layout.query_start_loc + 1 : layout.seq_lens] - 1,
        )


def _resolve(token_ids: torch.Tensor, last_token_ids: torch.Tensor) -> torch.Tensor:
    """Put the drawn ids in the place of the references to them, without asking the device what they are."""
    rows = (-1 - token_ids).clamp_(min=0)
    # A row whose logits were not finite drew -1. Its next step is under way already, to be dropped; any id will do.
    drawn = last_token_ids.index_select(0, rows).clamp_(min=0)
    return torch.where(token_ids >= 0, token_ids, drawn)
