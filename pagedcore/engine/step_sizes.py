"""The sizes to which steps are padded."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class StepSizes:
    """Sizes for which the executor has captured steps, each ascending. A step is padded to the next ones.

    decode_rows: of steps in which every row computes one token; up to max_num_seqs at least, or none. prefill_tokens and
    prefill_rows: of all other steps; those with more tokens are not padded. The last of prefill_rows is at least max_num_seqs.
    """

    decode_rows: tuple[int, ...] = ()
    prefill_tokens: tuple[int, ...] = ()
    prefill_rows: tuple[int, ...] = ()

    def padded(self, num_rows: int, num_tokens: int, is_decode: bool) -> tuple[int, int]:
        """The numbers of rows and tokens of a step with its padding."""
        if is_decode:
            if self.decode_rows:
                num_rows = num_tokens = self.decode_rows[bisect_left(self.decode_rows, num_rows)]
        elif self.prefill_tokens and num_tokens <= self.prefill_tokens[-1]:
            num_tokens = self.prefill_tokens[bisect_left(self.prefill_tokens, num_tokens)]
            num_rows = self.prefill_rows[bisect_left(self.prefill_rows, num_rows)]
        return num_rows, num_tokens


NO_PADDING = StepSizes()
