"""The real block manager, whose every growth can be taken over in one place."""

from __future__ import annotations

from pagedcore._core import BlockManager


class SingleGrowth(BlockManager):
    """Grows several sequences one by one, by `grow`, which subclasses change."""

    def grow_many(self, seq_ids: list[int], num_tokens: list[int], write_from: list[int]) -> int:
        for done, arguments in enumerate(zip(seq_ids, num_tokens, write_from, strict=True)):
            if not self.grow(*arguments):
                return done
        return len(seq_ids)
