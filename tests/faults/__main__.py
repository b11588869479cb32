"""Try every fault of the table and record what came of it.

Usage: python -m tests.faults [--record]

--record writes benchmarks/results/faults.json. The exit status is 0 if each came out as it must.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from benchmarks import report
from tests.faults.table import FAULTS, Fault


def run(folder: Path) -> dict[str, list[bool]]:
    """Run the tests of all faults; returns by test, without its parameters and with them, whether its cases passed."""
    names = list(dict.fromkeys(name for fault in FAULTS for name in fault.tests))
    report_file = folder / "report.xml"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "slow or not slow",
            f"--junitxml={report_file}",
            "-o",
            "junit_family=xunit1",
            *names,
        ],
        cwd=report.ROOT,
        check=False,
    )
    passed: dict[str, list[bool]] = defaultdict(list)
    for case in ElementTree.parse(report_file).getroot().iter("testcase"):
        path = case.get("classname", "").replace(".", "/") + ".py"
        name = f"{path}::{case.get('name', '')}"
        is_good = case.find("failure") is None and case.find("error") is None and case.find("skipped") is None
        for key in {name, name.partition("[")[0]}:
            passed[key].append(is_good)
    return passed


def cases(fault: Fault, passed: dict[str, list[bool]]) -> list[bool]:
    """Whether each of a fault's cases passed; a test that was not run has not."""
    return [case for name in fault.tests for case in passed.get(name, [False])]


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--record", action="store_true", help="write the figures to benchmarks/results")
    arguments = options.parse_args()
    commit = report.current_commit()
    with tempfile.TemporaryDirectory() as folder:
        passed = run(Path(folder))
    rows, num_failed = [], 0
    for fault in FAULTS:
        found = cases(fault, passed)
        num_failed += not all(found)
        name = f"{fault.name}: {fault.expected}"
        rows.append(report.row(name, sum(found), "passed", "cases", len(found), higher_is_better=True))
        if not all(found):
            print(f"FAILED: {name}")
    print(f"{len(FAULTS)} faults, {num_failed} of them with a failed case")
    if arguments.record:
        report.write("faults", rows, f"{len(FAULTS)} faults", measured=report.source(commit))
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
