"""What a part has measured so far: a file that is whole after every point, so that a run can be cut off and goes on later."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paper.workloads import DATA
from benchmarks.report import Source

FOLDER = DATA / "paper_gpu"  # where the files lie in the repository


@dataclass(frozen=True)
class Point:
    """One measurement. `key` says of what; `values` are its figures, by names with units."""

    key: tuple[str, ...]
    values: dict[str, float]


@dataclass
class Record:
    """The points of one part, in the order in which they were measured."""

    part: str
    shape: str
    source: Source
    points: list[Point] = field(default_factory=list)

    def find(self, *key: str) -> Point | None:
        """The point of this key, if it has been measured."""
        return next((point for point in self.points if point.key == key), None)

    @classmethod
    def load(cls, path: Path) -> Record:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        points = [Point(tuple(entry["key"]), entry["values"]) for entry in values["points"]]
        return cls(values["part"], values["shape"], Source(**values["source"]), points)


class TimeBox:
    """How long a call may still take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def has(self, seconds: float) -> bool:
        """Whether something that takes so long still fits."""
        return time.monotonic() + seconds <= self._end


class Recorder:
    """Writes a part's file, and tells what is in it already: from an earlier call, or from the repository."""

    def __init__(self, folder: Path, part: str, shape: str, source: Source, *, resume: bool) -> None:
        self._path = folder / f"{part}.json"
        self.record = Record(part, shape, source)
        for earlier in (self._path, FOLDER / self._path.name):
            if resume and earlier.exists():
                found = Record.load(earlier)
                if (found.shape, _gpu(found.source)) == (shape, _gpu(source)):
                    self.record.points = found.points
                    break

    def add(self, *key: str, **values: float) -> Point:
        """Keep a point and write the file anew."""
        point = Point(key, {name: float(f"{value:.6g}") for name, value in values.items()})
        self.record.points.append(point)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps(asdict(self.record), indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self._path)
        print(" | ".join(key), " ".join(f"{name}={value:g}" for name, value in point.values.items()), flush=True)
        return point


def _gpu(source: Source) -> str:
    """The GPU of a machine and its driver; of a machine without one, the machine."""
    return source.machine.rpartition("; ")[2]
