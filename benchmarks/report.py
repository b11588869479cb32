"""Result files: figures with the machine, commit and command that made them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One figure beside its peer's. `ratio` above 1 always means better than the peer ("floor": the hardware's limit)."""

    name: str
    value: float
    unit: str
    peer: str
    peer_value: float
    ratio: float


def row(name: str, value: float, unit: str, peer: str, peer_value: float, *, higher_is_better: bool) -> Row:
    """A Row with the ratio worked out."""
    ratio = value / peer_value if higher_is_better else peer_value / value
    return Row(name, round(value, 4), unit, peer, round(peer_value, 4), round(ratio, 3))


@dataclass(frozen=True)
class Source:
    """Where figures come from."""

    machine: str
    date: str
    commit: str
    command: str


def source(commit: str | None = None) -> Source:
    """This machine, today, the running script and what it measures; None: the commit that is checked out."""
    command = "python " + shlex.join([*_program(), *sys.argv[1:]])
    return Source(machine(), today(), current_commit() if commit is None else commit, command)


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def write(name: str, rows: list[Row], notes: str = "", measured: Source | None = None) -> Path:
    """Write benchmarks/results/`name`.json and print its rows. `measured`: where and when; None: here and now."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = asdict(measured or source()) | {"notes": notes, "rows": [asdict(entry) for entry in rows]}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    width = max(len(entry.name) for entry in rows)
    for entry in rows:
        peer = f"{entry.peer}: {entry.peer_value:g} {entry.unit}"
        print(f"{entry.name:<{width}}  {entry.value:10g} {entry.unit:<8}  {entry.ratio:6.2f} x  ({peer})")
    return path


def machine() -> str:
    """Processor, cores, memory and, where there is one, the GPU."""
    cpu = platform.processor() or platform.machine()
    memory = 0
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemTotal"):
            memory = round(int(line.split()[1]) / 2**20)
    text = f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory} GiB"
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return text
    gpus = (f"{count} x {gpu}" if count > 1 else gpu for gpu, count in Counter(lines).items())
    return "; ".join((text, *gpus))


def current_commit() -> str:
    """The commit measured, marked when the tree differs from it; where there is no git, what the file `.commit` says."""
    exported = ROOT / ".commit"
    if exported.exists():
        return exported.read_text(encoding="utf-8").strip()

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short=12", "HEAD") + ("-modified" if changed else "")


def _program() -> list[str]:
    """The arguments of `python` that begin this program: a script, or -m and a module."""
    spec = sys.modules["__main__"].__spec__
    return [_relative(sys.argv[0])] if spec is None else ["-m", spec.name.removesuffix(".__main__")]


def _relative(path: str) -> str:
    resolved = Path(path).resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else resolved.name
