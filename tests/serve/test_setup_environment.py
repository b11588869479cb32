"""`make setup` says in one line what a machine lacks, and never shows a traceback."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


def test_a_gpu_without_nvcc_is_one_line(
    setup_environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rather than kernels for the processor alone, which nobody with a GPU wants; unless they are asked for."""
    built: list[str] = []
    monkeypatch.setattr(setup_environment, "VENV", tmp_path)
    monkeypatch.setattr(setup_environment, "VENV_PYTHON", tmp_path / "python")
    monkeypatch.setattr(setup_environment, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setattr(setup_environment, "NVCC", tmp_path / "nvcc")
    monkeypatch.setattr(setup_environment, "missing_prerequisites", list)
    monkeypatch.setattr(setup_environment, "make_venv", lambda clear: None)
    monkeypatch.setattr(setup_environment, "install_torch", lambda *_: "torch")
    monkeypatch.setattr(setup_environment, "install_packages", lambda torch, extras, cuda: built.append(cuda))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(sys, "argv", ["setup"])
    assert setup_environment.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: nvcc, which compiles the kernels for a GPU, was not found") and "CUDA=OFF" in line
    monkeypatch.setattr(sys, "argv", ["setup", "--cuda", "OFF"])
    assert setup_environment.main() == 0
    (tmp_path / "nvcc").touch()
    monkeypatch.setattr(sys, "argv", ["setup"])
    assert setup_environment.main() == 0
    assert built == ["OFF", "ON"]


def test_no_network_is_one_line(bare_project: Path) -> None:
    result = _run(bare_project, PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(bare_project))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "error: installing torch==2.13.0 and the build tools failed: a package could not be downloaded; check"
    )
    assert "==> making .venv" in result.stdout


def _write_wheels(folder: Path, *versions: tuple[str, str]) -> None:
    """Empty wheels, by name and version."""
    for name, version in versions:
        information = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{information}/RECORD", "")


# All but the build of the project, which is empty here. The path says whether there is an NVIDIA driver.
_INSTALL_TORCH = """
import pathlib, sys
import setup_environment as setup
setup.NVIDIA_DRIVER = pathlib.Path(sys.argv[1])
setup.platform.system, setup.platform.machine = lambda: "Linux", lambda: "x86_64"
setup.CUDA_BYTES_NEEDED = 0
setup.install_packages = lambda *_: None
setup.set_up("", sys.argv[2], "OFF")
"""


def test_the_build_of_torch_that_suits_the_machine_is_installed(bare_project: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    tools = [
        ("scikit_build_core", "0.11"),
        ("pybind11", "2.13"),
        ("cmake", "3.30"),
        ("ninja", "1.11"),
        ("numpy", "1.26"),
    ]
    _write_wheels(wheels, ("torch", "2.13.0"), *tools)
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}

    def install(driver: Path, extras: str) -> tuple[str, str]:
        """What is printed, and the version of torch that is then installed."""
        command = [sys.executable, "-c", _INSTALL_TORCH, str(driver), extras]
        folder = bare_project / "scripts"
        output = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
        (information,) = (bare_project / ".venv").glob("lib/python*/site-packages/torch-*.dist-info")
        return output, information.name.removesuffix(".dist-info")

    output, version = install(tmp_path / "no driver", "a")
    assert "==> pip's index has no torch==2.13.0+cpu" in output
    assert version == "torch-2.13.0"
    _write_wheels(wheels, ("torch", "2.13.0+cpu"))
    output, version = install(tmp_path / "no driver", "b")
    assert version == "torch-2.13.0+cpu"
    (wheels / "torch-2.13.0+cpu-py3-none-any.whl").unlink()
    output, version = install(tmp_path, "b")  # a driver has come
    assert "==> making .venv" in output
    assert version == "torch-2.13.0"


def test_the_space_that_is_missing_is_that_of_the_build(
    setup_environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000_000_000))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    setup_environment.check_free_space("torch==2.13.0+cpu")
    with pytest.raises(
        setup_environment.SetupError, match=r"for torch==2\.13\.0 .* about 12 GB are needed, 4\.0 GB are"
    ):
        setup_environment.check_free_space("torch==2.13.0")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000_000))
    with pytest.raises(setup_environment.SetupError, match=r"about 3 GB are needed, 2\.0 GB are free"):
        setup_environment.check_free_space("torch==2.13.0+cpu")


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
