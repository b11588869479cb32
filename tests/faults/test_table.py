"""The table of faults names tests that exist, and enough of them."""

from __future__ import annotations

import ast

from benchmarks.report import ROOT
from tests.faults.__main__ import cases
from tests.faults.table import FAULTS, Fault


def test_each_fault_has_tests_that_exist() -> None:
    assert len(FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        for name in fault.tests:
            path, _, function = name.partition("[")[0].partition("::")
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert function in functions, name


def test_a_fault_whose_test_did_not_run_has_not_passed() -> None:
    fault = Fault("x", "y", ("a", "b"))
    assert cases(fault, {"a": [True, True]}) == [True, True, False]
