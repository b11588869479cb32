"""The audit sees what it is to see: pip-audit itself, asked about made-up advisories."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from tests.audit.__main__ import audit
from tests.audit.osv_service import AdvisoryDatabase, osv_service
from tests.audit.packages import installed, lowest

LISTED = """
id: PYSEC-1-1
aliases: [CVE-1-1]
affected:
- package: {name: Example_A, ecosystem: PyPI}
  versions: ["1.0", "1.1"]
"""
IN_RANGES = """
id: PYSEC-1-2
affected:
- package: {name: example-b, ecosystem: PyPI}
  ranges:
  - type: GIT
    events: [{introduced: "0"}]
  - type: ECOSYSTEM
    events: [{fixed: "1.5"}, {introduced: "0"}, {introduced: "2.0"}, {last_affected: "2.3"}]
"""


@pytest.fixture
def advisories(tmp_path: Path) -> Path:
    for package, name, text in (("example-a", "PYSEC-1-1", LISTED), ("example-b", "PYSEC-1-2", IN_RANGES)):
        folder = tmp_path / "vulns" / package
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("package", "version", "found"),
    [
        ("example-a", "1.1", ["PYSEC-1-1 = CVE-1-1"]),
        ("example-a", "1.1.0+cpu", ["PYSEC-1-1 = CVE-1-1"]),
        ("example-a", "1.2", []),
        ("example-b", "1.4.9", ["PYSEC-1-2"]),
        ("example-b", "1.5", []),
        ("example-b", "2.3", ["PYSEC-1-2"]),
        ("example-b", "2.4", []),
        ("example-c", "1.0", []),
    ],
)
def test_pip_audit_tells_what_the_advisories_say(
    advisories: Path, package: str, version: str, found: list[str]
) -> None:
    with osv_service(AdvisoryDatabase(advisories)) as url:
        assert audit({package: version}, url) == ({f"{package} {version}": found} if found else {})


def test_a_folder_without_advisories_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no advisories"):
        AdvisoryDatabase(tmp_path)


def test_what_is_audited_is_what_serving_needs() -> None:
    packages = installed()
    # Direct ones, those of an extra, and those that only others need.
    assert {"torch", "numpy", "gguf", "grpcio", "huggingface-hub", "markupsafe"} <= set(packages)
    assert "pytest" not in packages
    for name, bound in lowest().items():
        assert Version(bound) <= Version(metadata.version(name)) == Version(packages[name])
