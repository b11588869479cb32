"""`make setup` says in one line what a machine lacks, and never shows a traceback."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup_environment.py"


@pytest.fixture
def setup_environment() -> ModuleType:
    """The script as a module."""
    specification = importlib.util.spec_from_file_location("setup_environment", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up while they are being defined.
    sys.modules["setup_environment"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def bare_project(tmp_path: Path) -> Path:
    """A project folder without .venv: what a fresh clone has, as far as the script reads it."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "bare"\nversion = "1"\n')
    (tmp_path / "CMakeLists.txt").write_text("")
    return tmp_path


def _run(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(project / "scripts" / "setup_environment.py")]
    variables = {**os.environ, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)


def test_a_missing_compiler_is_one_line(bare_project: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = _run(bare_project, PATH=str(empty))
    assert result.stderr == "error: the C++ compiler g++ is missing; on Debian or Ubuntu: apt-get install g++\n"
    assert result.returncode == 1
    assert not (bare_project / ".venv").exists()


def test_a_compiler_without_cpp20_is_one_line(bare_project: Path, tmp_path: Path) -> None:
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho 'unrecognized option -std=c++20' >&2\nexit 1\n")
    old.chmod(0o755)
    result = _run(bare_project, CXX=str(old))
    assert result.stderr.startswith(f"error: the C++ compiler {old} does not compile C++20 (g++ 11 or newer does)")
    assert result.stderr.count("\n") == 1


def test_a_missing_libpython_is_one_line(
    setup_environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert setup_environment.missing_prerequisites() == []
    monkeypatch.setitem(sysconfig.get_config_vars(), "LIBDIR", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    name = f"libpython3.{sys.version_info.minor}"
    lines = [str(missing) for missing in setup_environment.missing_prerequisites()]
    expected = f"{name}.so.1.0 is missing (tritonserver embeds Python); on Debian or Ubuntu: apt-get install {name}"
    assert lines == [expected]


def test_no_network_is_one_line(bare_project: Path) -> None:
    result = _run(bare_project, PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(bare_project))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "error: installing torch and the build tools failed: a package could not be downloaded; check"
    )
    assert "==> making .venv" in result.stdout


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "no space left on"),
        ("a.cc:3:7: error: expected ';'\nERROR: Failed building wheel", "a.cc:3:7: error: expected ';'"),
        ("WARNING: a\nERROR: something else", "ERROR: something else"),
        ("", "exit status 2"),
    ],
)
def test_reason_of_a_failed_pip(setup_environment: ModuleType, log: str, reason: str) -> None:
    assert setup_environment.explain(log, 2).startswith(reason)


def test_a_changed_cpp_file_asks_for_a_new_build(bare_project: Path) -> None:
    def fingerprint() -> str:
        code = "import setup_environment; print(setup_environment.native_fingerprint('OFF'))"
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=bare_project / "scripts", stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    (bare_project / "kernels").mkdir()
    source = bare_project / "kernels" / "a.cc"
    source.write_text("int a;")
    first = fingerprint()
    assert fingerprint() == first
    source.write_text("int b;")
    assert fingerprint() != first
