"""Write the tables of docs/paper.md from benchmarks/results/paper.json, so that no figure is typed by hand.

Usage: python benchmarks/paper/page.py [--check]      --check: fail if the page is not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.report import RESULTS, ROOT

PAGE = ROOT / "docs" / "paper.md"
_SECTION = re.compile(r"(<!-- rows: ([^>]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def render(rows: list[dict[str, Any]], prefix: str) -> str:
    """The Markdown table of the rows whose names begin with `prefix` and a colon."""
    chosen = [row for row in rows if row["name"].startswith(prefix + ":")]
    if not chosen:
        raise ValueError(f"no row of the results begins with {prefix!r}")
    lines: list[str] = []
    for title, group in (
        ("ours", [row for row in chosen if row["peer"] == "paper"]),
        ("pagedcore", [row for row in chosen if row["peer"] != "paper"]),
    ):
        if not group:
            continue
        if lines:
            lines.append("")
        peer_title, ratio_title = ("the paper", "ours / the paper") if title == "ours" else ("the other", "ratio")
        lines += [f"| | {title} | {peer_title} | {ratio_title} |", "|---|---|---|---|"]
        for row in group:
            name = row["name"][len(prefix) + 1 :].strip()
            peer = f"{row['peer_value']:.4g}" + ("" if title == "ours" else f" ({row['peer']})")
            lines.append(f"| {name} | {row['value']:.4g} {row['unit']} | {peer} | {row['ratio']:.2f}x |")
    return "\n".join(lines) + "\n"


def rewritten(text: str) -> str:
    """`text` with every marked table made anew."""
    record = json.loads((RESULTS / "paper.json").read_text(encoding="utf-8"))
    source = f"\n{record['machine']}. Commit {record['commit']}, `{record['command']}`, {record['date']}.\n"

    def fill(match: re.Match[str]) -> str:
        body = source.lstrip() if match[2] == "source" else render(record["rows"], match[2])
        return match[1] + body + match[4]

    return _SECTION.sub(fill, text)


def write() -> None:
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        write()
        return 0
    fresh = rewritten(text)
    if fresh != text:
        print("docs/paper.md differs from benchmarks/results: run python benchmarks/paper/page.py", file=sys.stderr)
    return int(fresh != text)


if __name__ == "__main__":
    sys.exit(main())
