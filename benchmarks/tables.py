"""Write the result tables of README.md from benchmarks/results, so that no figure is typed by hand.

Usage: python benchmarks/tables.py [--check]      --check: fail if README.md is not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
_SECTION = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def render(name: str) -> str:
    """The Markdown table of one result file: a line per figure, a column per peer."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = record["rows"]
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = [
        "| | pagedcore | " + " | ".join(f"against {peer}" for peer in peers) + " |",
        "|---" * (2 + len(peers)) + "|",
    ]
    for figure in dict.fromkeys(row["name"] for row in rows):
        own = {row["peer"]: row for row in rows if row["name"] == figure}
        first = next(iter(own.values()))
        cells = [f"{own[peer]['ratio']:.2f}x ({own[peer]['peer_value']:,.0f})" if peer in own else "" for peer in peers]
        lines.append(f"| {figure} | {first['value']:,.0f} {first['unit']} | " + " | ".join(cells) + " |")
    source = f"{record['machine']}; {record['notes']}. Commit {record['commit']}, `{record['command']}`."
    return "\n".join(lines) + f"\n\n{source}\n"


def rewritten(text: str) -> str:
    """`text` with every marked table made anew."""
    return _SECTION.sub(lambda match: match[1] + render(match[2]) + match[4], text)


def main() -> int:
    text = README.read_text(encoding="utf-8")
    fresh = rewritten(text)
    if "--check" in sys.argv[1:]:
        if fresh != text:
            print("README.md differs from benchmarks/results: run python benchmarks/tables.py", file=sys.stderr)
        return int(fresh != text)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
