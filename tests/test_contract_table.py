"""The tests that docs/from-vllm-backend.md names for each part of the wire contract are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "from-vllm-backend.md"


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist() -> None:
    rows = PAGE.read_text().partition("\n## What shows it\n")[2].splitlines()
    rows = [row for row in rows if row.startswith("| **")]
    assert len(rows) > 40
    for row in rows:
        named = re.findall(r"`((?:[\w/]+/)?test_\w+\.py)::(test_\w+)`", row.split(" | ")[1])
        assert named, row
        for path, function in named:
            found = TESTS.parent / path if "/" in path else TESTS / "triton" / path
            assert function in functions(found), f"{path}::{function}"
