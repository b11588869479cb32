"""Audit what serving installs, and the lowest versions that it allows, by pip-audit.

Usage: python -m tests.audit [--advisories FOLDER] [--record]

Asks the OSV service on the network; with --advisories, a checkout of github.com/pypa/advisory-database instead. The exit status
is not 0 when a package has a known vulnerability. --record writes benchmarks/results/audit.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import report
from tests.audit.osv_service import AdvisoryDatabase, osv_service
from tests.audit.packages import installed, lowest


def audit(packages: Mapping[str, str], url: str | None = None) -> dict[str, list[str]]:
    """pip-audit's findings, by "name version"; no entry for a package without one.

    `url`: of another OSV service. Raises RuntimeError if a package was not looked at.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()), encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--strict", "--no-deps", "--disable-pip", "--format", "json"]
        command += ["--requirement", str(requirements), "--cache-dir", str(Path(folder, "cache"))]
        command += ["--vulnerability-service", "osv", *(["--osv-url", url] if url else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # 1: there are findings
    if not done.stdout:
        raise RuntimeError(done.stderr)
    dependencies: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    if {entry["name"] for entry in dependencies} != set(packages):
        raise RuntimeError(f"pip-audit has not looked at all of {sorted(packages)}: {done.stderr}")
    return {
        f"{entry['name']} {entry['version']}": [" = ".join([v["id"], *v["aliases"]]) for v in entry["vulns"]]
        for entry in dependencies
        if entry["vulns"]
    }


def audit_all(url: str | None = None) -> list[report.Row]:
    """Print the findings; the rows count packages and findings."""
    rows = []
    for title, packages in (("installed for serving", installed()), ("lowest versions allowed", lowest())):
        findings = audit(packages, url)
        for package, ids in findings.items():
            print(f"{title}: {package}: {', '.join(ids)}")
        clean = len(packages) - len(findings)
        rows.append(
            report.row(f"{title}, without a finding", clean, "packages", "all", len(packages), higher_is_better=True)
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description=__doc__)
    parser.add_argument("--advisories", type=Path, help="checkout of github.com/pypa/advisory-database")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/audit.json")
    args = parser.parse_args()
    if args.advisories is None:
        rows, notes = audit_all(), "advisories: the OSV service"
    else:
        with osv_service(AdvisoryDatabase(args.advisories)) as url:
            rows = audit_all(url)
        notes = f"advisories: the Python Packaging Advisory Database as of {_date_of(args.advisories)}"
    for row in rows:
        print(f"{row.name}: {row.value:.0f} of {row.peer_value:.0f} {row.unit}")
    if args.record:
        report.write("audit", rows, notes)
    return int(any(row.value != row.peer_value for row in rows))


def _date_of(checkout: Path) -> str:
    git = ["git", "-C", str(checkout), "log", "-1", "--format=%cs"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
