"""The sampler on packed buffers: penalties and bans against plain loops, tokens in flight, log probabilities of raw logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pagedcore.engine.request import Request
from pagedcore.engine.sampling_extras import FixedExtras, max_extras, pack_extras, pack_sampling_row
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import Sequence
from pagedcore.engine.step_plan import Header, SamplingColumn, StepLayout
from pagedcore.execution.sampler import Extras, SampledTokens, Sampler, apply_extras
from tests.reference import sampling

VOCAB_SIZE = 60
EOS = 2


@dataclass(frozen=True)
class Row:
    """One sequence before a draw. Of `output`, the last `num_in_flight` tokens are unknown to the host."""

    params: SamplingParams
    prompt: list[int]
    output: list[int]
    num_in_flight: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()

    def sequence(self) -> Sequence:
        stops = frozenset({EOS, *self.params.stop_token_ids})
        request = Request("r", self.prompt, self.params, bad_words=self.bad_words)
        sequence = Sequence(0, request, 1000, stops, self.params.seed or 0)
        sequence.token_ids.extend(self.output[: len(self.output) - self.num_in_flight])
        sequence.num_in_flight = self.num_in_flight
        return sequence

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


def packed_extras(rows: list[Row], out: npt.NDArray[np.int32]) -> int:
    """Write the extras of a step of these rows; returns their size."""
    sequences = [row.sequence() for row in rows]
    return pack_extras(
        [
            (i, sequence, fixed, len(row.output))
            for i, (row, sequence) in enumerate(zip(rows, sequences, strict=True))
            if (fixed := FixedExtras.of(sequence)) is not None
        ],
        out,
    )


def step(rows: list[Row], query_lens: list[int]) -> tuple[torch.Tensor, Header, torch.Tensor]:
    """The packed buffer of a step in which each row computes its last `query_lens[i]` tokens; header; input ids."""
    layout = StepLayout(sum(query_lens), len(rows), 1)
    buffer = np.full(layout.copies + max_extras(len(rows), 200), -7, np.int32)
    num_extras = packed_extras(rows, buffer[layout.copies :])
    buffer = buffer[: layout.copies + num_extras]
    buffer[layout.query_start_loc + 1 : layout.seq_lens] = np.cumsum(query_lens)
    table = buffer[layout.sampling : layout.copies].reshape(len(rows), -1)
    for i, row in enumerate(rows):
        table[i] = pack_sampling_row(row.params, row.params.seed or 0)
        table[i, SamplingColumn.DRAW_INDEX] = len(row.output)
    header = Header(
        num_tokens=layout.num_tokens,
        num_rows=len(rows),
        table_width=1,
        num_real_tokens=layout.num_tokens,
        num_real_rows=len(rows),
        max_query_len=max(query_lens),
        max_seq_len=max(len(row.tokens) for row in rows),
        num_copies=0,
        extras_offset=layout.copies if num_extras else 0,
        num_extras=num_extras,
        any_random=int(any(not row.params.is_greedy for row in rows)),
        max_logprobs=int(table[:, SamplingColumn.NUM_LOGPROBS].max()),
    )
    input_ids = [token for row, n in zip(rows, query_lens, strict=True) for token in row.tokens[-n:]]
    return torch.from_numpy(buffer), header, torch.tensor(input_ids, dtype=torch.int32)


def run(rows: list[Row], logits: npt.NDArray[np.float32], query_lens: list[int] | None = None) -> SampledTokens:
    buffer, header, input_ids = step(rows, query_lens or [1] * len(rows))
    return Sampler()(torch.from_numpy(logits.copy()), buffer, header, input_ids)


def expected_logits(row: Row, logits: npt.NDArray[np.float32]) -> sampling.FloatArray:
    params = row.params
    logits = logits.copy()
    for token, bias in params.logit_biases:
        logits[token] += bias
    values = sampling.penalize(
        logits, row.prompt, row.output, params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    )
    if len(row.output) < params.min_tokens:
        for token in {EOS, *params.stop_token_ids}:
            values[token] = -np.inf
    for token in range(VOCAB_SIZE):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            values[token] = -np.inf
    for word in row.bad_words:
        if row.output[max(0, len(row.output) - len(word) + 1) :] == list(word[:-1]):
            values[word[-1]] = -np.inf
    return values


def bad_word(rng: np.random.Generator, output: list[int]) -> tuple[int, ...]:
    """Of 1 to 4 tokens, the first of which the output mostly ends with, so that the last one completes the word."""
    start = output[len(output) - int(rng.integers(0, min(3, len(output)) + 1)) :]
    if start and rng.integers(3) == 0:
        start[int(rng.integers(len(start)))] = 9  # or nearly
    return (*start, int(rng.integers(VOCAB_SIZE)))


def random_rows(rng: np.random.Generator, count: int) -> list[Row]:
    rows = []
    for _ in range(count):
        params = SamplingParams(
            temperature=0.0,
            repetition_penalty=float(rng.choice([1.0, 0.8, 1.3])),
            presence_penalty=float(rng.choice([0.0, 0.7, -0.4])),
            frequency_penalty=float(rng.choice([0.0, 0.25, -0.1])),
            min_tokens=int(rng.choice([0, 3])),
            stop_token_ids=[int(rng.integers(VOCAB_SIZE))],
            logit_bias={int(token): float(rng.normal()) for token in rng.integers(0, VOCAB_SIZE, rng.integers(4))},
            allowed_token_ids=None if rng.integers(2) else rng.choice(VOCAB_SIZE, 20, replace=False).tolist(),
            bad_words=["stands for those of the row"],
        )
        output = rng.integers(0, 8, int(rng.integers(0, 9))).tolist()  # few values: many repetitions
        in_flight = int(rng.integers(2)) if output else 0
        prompt = rng.integers(0, VOCAB_SIZE, int(rng.integers(1, 20))).tolist()
        bad_words = tuple(bad_word(rng, output) for _ in range(int(rng.integers(5))))
        rows.append(Row(params, prompt, output, in_flight, bad_words))
    return rows


def test_biases_penalties_and_bans_equal_plain_loops() -> None:
    rng = np.random.default_rng(0)
    for num_rows in (1, 2, 17, 60):
        rows = random_rows(rng, num_rows)
        logits = rng.normal(0.0, 3.0, (num_rows, VOCAB_SIZE)).astype(np.float32)
        query_lens = [min(len(row.tokens), int(rng.integers(1, 4))) for row in rows]
        buffer, header, input_ids = step(rows, query_lens)
        actual = torch.from_numpy(logits.copy())
        if header.num_extras:
            section = buffer[header.extras_offset :]
            extras = Extras.from_buffer(section, section)
            apply_extras(actual, extras, input_ids[torch.tensor(query_lens).cumsum(0) - 1])
        for i, row in enumerate(rows):
            np.testing.assert_allclose(actual[i].numpy(), expected_logits(row, logits[i]), atol=2e-6, err_msg=str(row))
        tokens = run(rows, logits, query_lens).token_ids.tolist()
        assert tokens == [int(expected_logits(row, logits[i]).argmax()) for i, row in enumerate(rows)]


def test_a_token_in_flight_counts_like_a_known_one() -> None:
    rng = np.random.default_rng(1)
    params = SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.5, seed=5)
    logits = rng.normal(0.0, 2.0, (40, VOCAB_SIZE)).astype(np.float32)
    rows = [Row(params, [1, 2, 3], rng.integers(0, VOCAB_SIZE, i).tolist()) for i in range(1, 41)]
    in_flight = [Row(row.params, row.prompt, row.output, 1) for row in rows]
    assert torch.equal(run(rows, logits).token_ids, run(in_flight, logits).token_ids)

    likes_repeating = SamplingParams(temperature=0.0, presence_penalty=-2.0)
    first_output_in_flight = [Row(likes_repeating, [1, 2], [token], 1) for token in (7, 8)]
    assert run(first_output_in_flight, logits[:2] * 0, query_lens=[3, 2]).token_ids.tolist() == [7, 8]


def test_min_tokens_counts_tokens_in_flight() -> None:
    logits = np.zeros((3, VOCAB_SIZE), np.float32)
    logits[:, EOS], logits[:, 9], logits[:, 30] = 5.0, 4.0, 3.0
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[9])
    rows = [Row(params, [1], []), Row(params, [1], [4], 1), Row(params, [1], [4, 5], 1)]
    assert run(rows, logits).token_ids.tolist() == [30, 30, EOS]
    room = np.zeros(100, np.int32)
    assert [packed_extras([Row(params, [1], [4] * n)], room) > 0 for n in (0, 1, 2, 3)] == [True, True, False, False]


def test_plain_rows_need_no_extras() -> None:
    room = np.zeros(100, np.int32)
    assert packed_extras([Row(SamplingParams(logit_bias={1: 1.0}), [1], [4] * 5)], room) > 0
    plain = SamplingParams(temperature=0.5, top_k=3, logprobs=2, seed=1)
    assert packed_extras([Row(plain, [1], [])], room) == 0


def test_extras_fit_the_room_reserved_for_them() -> None:
    max_model_len = 50
    params = SamplingParams(
        repetition_penalty=1.1,
        min_tokens=16,
        stop_token_ids=list(range(100, 228)),
        logit_bias=dict.fromkeys(range(1024), 1.0),
        allowed_token_ids=list(range(1024)),
        bad_words=["x"] * 128,
    )
    row = Row(params, list(range(40)), list(range(10)), 1, tuple((token,) for token in range(256)))
    room = max_extras(7, max_model_len)
    assert 7 * (40 + 10 + 3 * 1024) < packed_extras([row] * 7, np.zeros(room, np.int32)) <= room


def test_rows_do_not_touch_their_neighbours() -> None:
    rng = np.random.default_rng(2)
    rows = random_rows(rng, 30)
    rows[::3] = [Row(SamplingParams(seed=i), [1], []) for i in range(10)]
    logits = rng.normal(0.0, 3.0, (30, VOCAB_SIZE)).astype(np.float32)
    together = run(rows, logits).token_ids.tolist()
    assert together == [int(run([row], logits[i : i + 1]).token_ids) for i, row in enumerate(rows)]


def test_draws_depend_on_seed_and_number_of_output_tokens_only() -> None:
    logits = np.zeros((1, VOCAB_SIZE), np.float32)

    def token(seed: int, num_output_tokens: int, prompt: int) -> int:
        row = Row(SamplingParams(seed=seed), [prompt], [1] * num_output_tokens)
        return int(run([row], logits).token_ids)

    assert token(7, 3, prompt=5) == token(7, 3, prompt=6)
    assert len({token(7, n, prompt=5) for n in range(40)}) > 20
    assert len({token(seed << 32, 3, prompt=5) for seed in range(40)}) > 20


def test_logprobs_are_of_the_models_own_distribution() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0.0, 3.0, (3, VOCAB_SIZE)).astype(np.float32)
    rows = [
        Row(SamplingParams(temperature=0.3, repetition_penalty=5.0, logprobs=4, seed=1), list(range(50)), []),
        Row(SamplingParams(temperature=0.0), [1], []),
        Row(SamplingParams(temperature=0.0, min_tokens=4, logprobs=0), [1], []),
    ]
    logits[2, EOS] = 50.0
    sampled = run(rows, logits).to_result()
    assert sampled.chosen_logprobs is not None and sampled.chosen_ranks is not None
    assert sampled.top_logprobs is not None and sampled.top_token_ids is not None
    assert sampled.token_ids[2] != EOS and sampled.chosen_ranks[2] == 2
    for i in range(3):
        expected = sampling.log_softmax(logits[i])
        order = np.argsort(-expected)
        assert sampled.chosen_logprobs[i] == pytest.approx(expected[sampled.token_ids[i]], abs=1e-5)
        assert order[sampled.chosen_ranks[i] - 1] == sampled.token_ids[i]
        assert sampled.top_token_ids[i].tolist() == order[:4].tolist()
        np.testing.assert_allclose(sampled.top_logprobs[i], expected[order[:4]], atol=1e-5)
    plain = run(rows[1:2], logits[1:2])
    assert plain.chosen_logprobs is None and plain.to_result().top_logprobs is None


def test_a_row_of_nan_fails_alone() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, VOCAB_SIZE)).astype(np.float32)
    rows = [Row(SamplingParams(seed=1, frequency_penalty=1.0, logprobs=2), [1], [5, 6]) for _ in range(3)]
    intact = run(rows, logits).token_ids.tolist()
    logits[1, 3] = np.nan
    assert run(rows, logits).token_ids.tolist() == [intact[0], -1, intact[2]]


def test_sampling_row_holds_every_bit_of_the_seed() -> None:
    params = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, logprobs=3)
    row = pack_sampling_row(params, 0xFEDCBA9876543210)
    expected = sampling.Draw(0.7, 40, 0.9, 0.05, 0xFEDCBA9876543210, 0, 3).pack()
    assert row.tolist() == expected.tolist()
