"""The pages name every parameter and argument, and the tests that docs/from-vllm-backend.md names are there."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from pagedcore.config import EngineConfig
from pagedcore.engine.sampling_params import SamplingParams

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "from-vllm-backend.md"
README = TESTS.parent / "README.md"
SAMPLING_PARAMETERS = {field.name for field in dataclasses.fields(SamplingParams) if field.init} | {"cache_salt"}
ENGINE_ARGUMENTS = {field.name for field in dataclasses.fields(EngineConfig)}


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


@pytest.mark.parametrize(
    ("page", "section", "names"),
    [
        (PAGE, "Sampling parameters", SAMPLING_PARAMETERS),
        (README, "Inputs and outputs of `llm`", SAMPLING_PARAMETERS),
        (PAGE, "Engine arguments (`model.json`)", ENGINE_ARGUMENTS),
    ],
)
def test_a_page_names_every_one_of_them(page: Path, section: str, names: set[str]) -> None:
    text = page.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    assert names <= set(re.findall(r"`(\w+)`", text)), names - set(re.findall(r"`(\w+)`", text))
