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
_NOTHING = "Not measured yet.\n"
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


def _source(record: dict[str, Any]) -> str:
    return f"{record['machine']}. Commit {record['commit']}, `{record['command']}`, {record['date']}.\n"


def _gpu_section(rows: list[dict[str, Any]], name: str) -> str:
    if not any(row["name"].startswith(name + ":") for row in rows):
        return _NOTHING
    picture = f"paper/{name.replace('gpu fig ', 'gpu_fig').replace('gpu ', 'gpu_')}.png"
    return f"![{name.removeprefix('gpu ')}]({picture})\n\n{render(rows, name)}"


def rewritten(text: str) -> str:
    """`text` with every marked section made anew; those of the GPU hold their picture, and say when there is nothing yet."""
    record = json.loads((RESULTS / "paper.json").read_text(encoding="utf-8"))
    gpu_file = RESULTS / "paper_gpu.json"
    gpu = json.loads(gpu_file.read_text(encoding="utf-8")) if gpu_file.exists() else None

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        if name == "source":
            body = _source(record)
        elif name == "gpu source":
            body = _source(gpu) if gpu is not None else _NOTHING
        elif name.startswith("gpu "):
            body = _gpu_section(gpu["rows"] if gpu is not None else [], name)
        else:
            body = render(record["rows"], name)
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
