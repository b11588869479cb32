"""Makes .venv with the project in it, checking first what the machine lacks; does nothing when nothing has changed.

Run by the Makefile with the system's Python, so it uses the standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

SUPPORTED = ((3, 10), (3, 11), (3, 12))
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
LOG = ROOT / "build" / "setup.log"
BUILD_REQUIREMENTS = ["scikit-build-core>=0.10", "pybind11>=2.13", "cmake>=3.24", "ninja"]
NATIVE_SOURCES = ("pagedcore/csrc", "kernels")
PIP_INSTALL = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--retries", "2"]
# Without build isolation CMake finds its last build.
EDITABLE = ["--no-build-isolation", "--editable"]
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
BYTES_NEEDED = 3_000_000_000

CPP20_PROBE = "#include <bit>\n#include <span>\nint main() { return std::span<int>().size() + std::popcount(0u); }\n"


class SetupError(RuntimeError):
    """Something the user has to fix, said in one line."""


@dataclass(frozen=True)
class Missing:
    """Something this machine lacks, and the Debian package that has it."""

    problem: str
    package: str

    def __str__(self) -> str:
        return f"{self.problem}; on Debian or Ubuntu: apt-get install {self.package}"


def missing_prerequisites() -> list[Missing]:
    """Return what this machine lacks."""
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    missing = []
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        missing.append(Missing("Python's venv module is missing", f"{name}-venv"))
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(Missing("Python.h is missing", f"{name}-dev"))
    if not has_libpython(f"lib{name}.so.1.0"):
        missing.append(Missing(f"lib{name}.so.1.0 is missing (tritonserver embeds Python)", f"lib{name}"))
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        missing.append(Missing(f"the C++ compiler {compiler} is missing", "g++"))
    elif not compiles_cpp20(compiler):
        missing.append(Missing(f"the C++ compiler {compiler} does not compile C++20 (g++ 11 or newer does)", "g++"))
    return missing


def check_python_version() -> None:
    """Raise SetupError unless this Python is supported."""
    if sys.version_info[:2] in SUPPORTED:
        return
    others = [f"python3.{minor}" for _, minor in SUPPORTED if shutil.which(f"python3.{minor}")]
    hint = f"run: make PYTHON={others[-1]}" if others else "on Debian or Ubuntu: apt-get install python3.11"
    found = "{}.{}".format(*sys.version_info[:2])
    raise SetupError(f"Python {found} is not supported, 3.10, 3.11 or 3.12 is needed; {hint}")


def has_libpython(soname: str) -> bool:
    """True if the shared library of this Python is where the linker of an embedding program will look."""
    library_dir = sysconfig.get_config_var("LIBDIR") or ""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    folders = (library_dir, os.path.join(library_dir, multiarch), os.path.join(sys.base_prefix, "lib"))
    return any(Path(folder, soname).is_file() for folder in folders)


def compiles_cpp20(compiler: str) -> bool:
    """True if `compiler` accepts a small C++20 program."""
    command = [compiler, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=CPP20_PROBE.encode(), stderr=subprocess.DEVNULL, check=False).returncode == 0


def packages_fingerprint(torch: str, extras: str) -> str:
    """Hash of everything that decides which packages are installed."""
    digest = hashlib.sha256(f"{sys.version} {sys.prefix} {ROOT} {torch} {extras}".encode())
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def native_fingerprint(cuda: str) -> str:
    """Hash of everything that the native modules are built from."""
    digest = hashlib.sha256(cuda.encode())
    files = [ROOT / "CMakeLists.txt"]
    for folder in NATIVE_SOURCES:
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".cc", ".h", ".cu", ".cuh")]
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def make_venv() -> None:
    """Make .venv, or make it again if it is broken or belongs to another Python version."""
    probe = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    if VENV_PYTHON.exists():
        found = subprocess.run([VENV_PYTHON, "-c", probe], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip() == "{}.{}".format(*sys.version_info[:2]):
            return
    step("making .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])


def install_packages(torch: str, extras: str, cuda: str) -> None:
    """Install torch, then everything else and the project in editable mode, which builds the native modules."""
    wanted = torch.split()
    step("installing torch and the build tools", [*PIP_INSTALL, *wanted, "numpy<2", *BUILD_REQUIREMENTS])
    step("building and installing pagedcore", [*PIP_INSTALL, *EDITABLE, f"{ROOT}[{extras}]", *wanted], cuda)


def rebuild(cuda: str) -> None:
    """Build the native modules again; CMake recompiles only what has changed."""
    step("building the native modules", [*PIP_INSTALL, "--no-deps", *EDITABLE, str(ROOT)], cuda)


def step(name: str, command: list[str], cuda: str = "OFF") -> None:
    """Run one long command, its standard output shown, and say how long it took."""
    print(f"==> {name}", flush=True)
    start = time.monotonic()
    LOG.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "SKBUILD_CMAKE_DEFINE": f"PAGEDCORE_CUDA={cuda}"}
    with LOG.open("w") as log:
        status = subprocess.run(command, cwd=ROOT, env=environment, stderr=log, check=False).returncode
    if status != 0:
        raise SetupError(f"{name} failed: {explain(LOG.read_text(errors='replace'), status)}")
    print(f"==> {name}: {time.monotonic() - start:.0f} s", flush=True)


def explain(log: str, status: int) -> str:
    """The reason in the output of a failed pip, as one line."""
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return f"no space left on the disk of {ROOT}, about {BYTES_NEEDED / 1e9:.0f} GB are needed"
    network = ("Max retries exceeded", "NewConnectionError", "NameResolutionError", "ReadTimeoutError", "ProxyError")
    if any(sign in log for sign in network) or "Could not find a version" in log:
        return f"a package could not be downloaded; check the network or pip's index ({last_error(log)})"
    compiler_errors = [line for line in log.splitlines() if ": error: " in line or "CMake Error" in line]
    if compiler_errors:
        return f"{compiler_errors[0].strip()} (all of it: {LOG})"
    return f"{last_error(log) or f'exit status {status}'} (all of it: {LOG})"


def last_error(log: str) -> str:
    """The last line that pip marks as an error."""
    errors = [line.strip() for line in log.splitlines() if line.startswith(("ERROR", "error", "OSError"))]
    return errors[-1] if errors else ""


def set_up(torch: str, extras: str, cuda: str) -> None:
    """Bring .venv up to date; raises SetupError."""
    check_python_version()
    packages_stamp = VENV / f".pagedcore-{extras.replace(',', '-')}"
    native_stamp = VENV / ".pagedcore-native"
    packages, native = packages_fingerprint(torch, extras), native_fingerprint(cuda)
    packages_current = VENV_PYTHON.exists() and read(packages_stamp) == packages
    if packages_current and read(native_stamp) == native:
        return
    missing = missing_prerequisites()
    if missing:
        raise SetupError("\nerror: ".join(map(str, missing)))
    if packages_current:
        rebuild(cuda)
    else:
        make_venv()
        install_packages(torch, extras, cuda)
        packages_stamp.write_text(packages)
    native_stamp.write_text(native)


def read(path: Path) -> str:
    """The text of a file, empty if there is none."""
    return path.read_text() if path.is_file() else ""


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="torch==2.13.0", help="pip requirement and options for torch")
    parser.add_argument("--extras", default="serve", help="extras of pyproject.toml, separated by commas")
    parser.add_argument(
        "--cuda", default="", help="build the CUDA kernels: ON, OFF, or empty (where an NVIDIA driver and nvcc are)"
    )
    parser.add_argument("--list-missing", action="store_true", help="only print the Debian packages that are missing")
    arguments = parser.parse_args()
    if arguments.list_missing:
        print(*(missing.package for missing in missing_prerequisites()))
        return 0
    # Compiling for GPUs takes minutes, and a machine without a driver could not use the result.
    cuda = arguments.cuda or ("AUTO" if NVIDIA_DRIVER.exists() else "OFF")
    try:
        set_up(arguments.torch, arguments.extras, cuda)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
