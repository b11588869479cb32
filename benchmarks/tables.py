"""Write the result tables of README.md and of pages in docs/ from benchmarks/results, so that no figure is typed by hand.

Usage: python benchmarks/tables.py [--check]

--check: fail if one of them is not what the results say, or if a table of docs/gpu-status.md, which is laid out by hand, has a
figure with a fraction that none of the results named there has.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "operations.md", ROOT / "docs" / "reliability.md")
GPU_STATUS = ROOT / "docs" / "gpu-status.md"
_SECTION = re.compile(r"(<!-- table: (\w+)(?:, only (.*?))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def number(value: float) -> str:
    """Without a fraction, or, small, with three digits."""
    return f"{value:,.0f}" if value >= 20 else f"{value:.3g}"


def render(name: str, only: str | None = None) -> str:
    """The Markdown table of one result file: a line per figure (those that end with `only`), a column per peer."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = [row for row in record["rows"] if only is None or row["name"].endswith(only)]
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = [
        "| | pagedcore | " + " | ".join(f"against {peer}" for peer in peers) + " |",
        "|---" * (2 + len(peers)) + "|",
    ]
    for figure in dict.fromkeys(row["name"] for row in rows):
        own = {row["peer"]: row for row in rows if row["name"] == figure}
        first = next(iter(own.values()))
        cells = [_against(own[peer]) if peer in own else "" for peer in peers]
        lines.append(f"| {figure} | {number(first['value'])} {first['unit']} | " + " | ".join(cells) + " |")
    source = f"{record['machine']}; {record['notes']}. Commit {record['commit']}, `{record['command']}`."
    return "\n".join(lines) + f"\n\n{source}\n"


def _against(row: dict[str, Any]) -> str:
    ratio = number(row["ratio"]) if row["ratio"] >= 100 else f"{row['ratio']:.2f}"
    return f"{ratio}x ({number(row['peer_value'])})"


def rewritten(text: str) -> str:
    """`text` with every marked table made anew."""
    return _SECTION.sub(lambda match: match[1] + render(match[2], match[3]) + match[5], text)


def unknown_figures(text: str) -> list[str]:
    """Figures with a fraction in the tables of `text` that are, rounded, in none of the result files it names."""
    names = set(re.findall(r"`(?:benchmarks/results/)?(\w+)\.json`", text))
    records = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in sorted(names)]
    rows = [row for record in records for row in record["rows"]]
    known = [row[field] for row in rows for field in ("value", "peer_value", "ratio")]
    tables = " ".join(line for line in text.splitlines() if line.startswith("|"))
    figures = re.findall(r"(?<![\w.-])[0-9]+\.[0-9]+(?![0-9.])", tables)
    return [
        figure
        for figure in figures
        if all(abs(value - float(figure)) > 0.5000001 * 10.0 ** -len(figure.partition(".")[2]) for value in known)
    ]


def check() -> list[str]:
    """What is wrong with the documents, a line each."""
    stale = [
        f"{page.relative_to(ROOT)} differs from benchmarks/results: run python benchmarks/tables.py"
        for page in PAGES
        if rewritten(text := page.read_text(encoding="utf-8")) != text
    ]
    figures = unknown_figures(GPU_STATUS.read_text(encoding="utf-8"))
    return stale + [f"docs/gpu-status.md: {figure} is in none of the results that it names" for figure in figures]


def main() -> int:
    if "--check" in sys.argv[1:]:
        problems = check()
        print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
        return int(bool(problems))
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
