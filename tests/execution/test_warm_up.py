"""The draws for which a GPU's memory is allocated at the start are as large as any that can come."""

from __future__ import annotations

import torch

from pagedcore.engine.sampling_extras import max_extras
from pagedcore.execution.sampler import Extras, apply_extras
from pagedcore.execution.warm_up import largest_extras


def test_they_are_as_large_as_the_largest_that_a_step_packs() -> None:
    for num_rows, max_model_len in ((1, 10), (3, 100), (64, 1000)):
        packed = largest_extras(num_rows * (max_model_len + 1), num_rows, 300)
        assert len(packed) == max_extras(num_rows, max_model_len)


def test_they_can_be_applied() -> None:
    packed = torch.from_numpy(largest_extras(1000, 7, 50))
    extras = Extras.from_buffer(packed, packed)
    assert extras.rows.tolist() == list(range(7))
    assert int(extras.prompt_lens.sum() + extras.output_lens.sum()) == 1000
    logits = torch.zeros(9, 50)
    apply_extras(logits, extras, torch.zeros(9, dtype=torch.int32))
    assert torch.equal(logits[7:], torch.zeros(2, 50))
    assert torch.isneginf(logits[:7]).all()  # every token is banned after token 0
