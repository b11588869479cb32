"""The simulation finds every planted fault: so it is not blind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.mutants import PYTHON_MUTANTS, Mutant
from tests.simulation.native_mutants import NATIVE_MUTANTS
from tests.simulation.planting import planted

ROOT = Path(__file__).resolve().parents[2]


def test_every_mutant_is_found() -> None:
    command = [sys.executable, "-m", "tests.simulation.hunt"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.endswith("[NOT FOUND]")] == []
    assert len(lines) == len(PYTHON_MUTANTS) + len(NATIVE_MUTANTS) and result.returncode == 0


def test_mutants_are_named_apart_and_say_where_they_belong() -> None:
    mutants = PYTHON_MUTANTS + NATIVE_MUTANTS
    assert len({mutant.what for mutant in mutants}) == len(mutants)
    missing = Mutant("nothing", "engine/seeds.py", "not in the file", "")
    with pytest.raises(ValueError, match=r"its text is 0 times in pagedcore/engine/seeds.py"), planted(missing):
        pass
