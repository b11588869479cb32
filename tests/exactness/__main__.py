"""Compare the engine with transformers and with itself, on the default model, and record how far they agree.

Usage: python -m tests.exactness [--record]

--record writes benchmarks/results/exactness.json. The exit status is 1 where a token differs that is no tie, or a bit.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch

from benchmarks import report
from benchmarks.report import Row
from pagedcore import LLM, SamplingParams, TokensPrompt, ops
from pagedcore.serve.default_model import ensure_default_model
from tests.exactness import logits, reference, schedules, split_sums

FLOAT32_LIMIT = 1e-3
DTYPES = ("float32", "bfloat16")
NUM_LOGITS = 16


@dataclass
class Findings:
    """Rows for the result file, what its notes say, and whether everything agrees."""

    rows: list[Row]
    notes: list[str]
    agrees: bool = True


def compare_tokens(findings: Findings) -> None:
    """Greedy tokens in float32 against the recorded ones of transformers."""
    references = reference.load()
    llm = LLM(model=str(ensure_default_model()), dtype="float32", max_model_len=1024)
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=continuation.prompt_token_ids) for continuation in references],
        SamplingParams(temperature=0, max_tokens=reference.NUM_TOKENS, ignore_eos=True, detokenize=False),
    )
    llm.shutdown()
    agreements = [
        reference.compare(continuation, output.outputs[0].token_ids)
        for continuation, output in zip(references, outputs, strict=True)
    ]
    wrong = [c.source for c, agreement in zip(references, agreements, strict=True) if not agreement.excused]
    whole = sum(agreement.num_equal == reference.NUM_TOKENS for agreement in agreements)
    findings.agrees &= not wrong
    findings.rows += [
        _of_all(
            "greedy continuations equal to transformers' in float32, or up to a tie",
            len(agreements) - len(wrong),
            len(agreements),
        ),
        _of_all("their tokens", sum(a.num_equal for a in agreements), len(agreements) * reference.NUM_TOKENS),
    ]
    ties = len(agreements) - len(wrong) - whole
    findings.notes.append(
        f"{len(agreements)} prompts, {reference.NUM_TOKENS} tokens each; {whole} whole, {ties} up to a tie "
        f"(two best logits less than {reference.TIE:g} apart), {len(wrong)} wrong"
    )


def compare_logits(findings: Findings) -> None:
    """Logits in both dtypes against transformers' in float32, and the errors of transformers' bfloat16."""
    folder, chosen = ensure_default_model(), reference.load()[::5]
    ours, _ = logits.errors(folder, torch.float32, chosen, NUM_LOGITS)
    findings.rows.append(_below("largest error of a float32 logit", ours.largest, "limit", FLOAT32_LIMIT))
    ours, theirs = logits.errors(folder, torch.bfloat16, chosen, NUM_LOGITS)
    peer = "transformers' bfloat16"
    findings.rows += [
        _below("mean error of a bfloat16 logit", ours.mean, peer, theirs.mean),
        _below("largest error of a bfloat16 logit", ours.largest, peer, theirs.largest),
    ]


def compare_schedules(findings: Findings) -> None:
    """Bits of log probabilities under every schedule against those of each request by itself, and the inverse control."""
    alone = {dtype: schedules.alone(dtype) for dtype in DTYPES}
    num_positions = sum(len(row) for positions in alone.values() for row in positions)
    num_threads = ops.num_threads()
    for schedule in schedules.SCHEDULES:
        different = sum(schedules.num_different(schedules.under(schedule, dtype), alone[dtype]) for dtype in DTYPES)
        ops.set_num_threads(num_threads)
        total = num_positions * (2 if schedule.twice else 1)
        findings.rows.append(_of_all(f"same bits: {schedule.name}", total - different, total))
        findings.agrees &= different == 0
    with split_sums.planted():
        plain = schedules.WITHOUT_GRAPHS
        different = sum(schedules.num_different(schedules.under(plain, dtype), alone[dtype]) for dtype in DTYPES)
    findings.rows.append(
        _of_all(
            "inverse control, same bits with sums that are split in small batches",
            num_positions - different,
            num_positions,
        )
    )
    findings.agrees &= different > 0
    findings.notes.append(
        f"bits: of the {schedules.NUM_LOGPROBS} most likely tokens' log probabilities and the chosen one's, float32 and bfloat16"
    )


def _of_all(name: str, value: int, total: int) -> Row:
    return report.row(name, value, "", "all", total, higher_is_better=True)


def _below(name: str, value: float, peer: str, limit: float) -> Row:
    """A Row of errors, which have more digits behind the point than `report.row` keeps."""
    return Row(name, float(f"{value:.4g}"), "", peer, float(f"{limit:.4g}"), round(limit / value, 3))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the engine with transformers and with itself.")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/exactness.json")
    options = parser.parse_args()
    findings, measured = Findings([], []), report.source()
    for compare in (compare_tokens, compare_logits, compare_schedules):
        compare(findings)
    for row in findings.rows:
        print(f"{row.name}: {row.value:g} ({row.peer}: {row.peer_value:g})")
    print(*findings.notes, sep="\n")
    if options.record:
        report.write("exactness", findings.rows, "; ".join(findings.notes), measured)
    return int(not findings.agrees)


if __name__ == "__main__":
    sys.exit(main())
