"""Makes .venv with the project in it, checking first what the machine lacks; does nothing when nothing has changed.

Run by the Makefile with the system's Python, so it uses the standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
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
NVCC = Path("/usr/local/cuda/bin/nvcc")  # where NVIDIA's packages put it, which is on no PATH by itself
TORCH_VERSION = "2.13.0"
CPU_BYTES_NEEDED = 3_000_000_000
CUDA_BYTES_NEEDED = 12_000_000_000  # torch, NVIDIA's libraries, and pip's downloads of both

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
    hint = f"run: make serve PYTHON={others[-1]}" if others else "on Debian or Ubuntu: apt-get install python3.11"
    found = "{}.{}".format(*sys.version_info[:2])
    raise SetupError(f"Python {found} is not supported, 3.10, 3.11 or 3.12 is needed; {hint}")


def find_nvcc() -> str:
    """The CUDA compiler, or an empty text where there is none."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (str(NVCC) if NVCC.exists() else "")


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


def packages_fingerprint(candidates: list[str], extras: str) -> str:
    """Hash of everything that decides which packages are installed."""
    digest = hashlib.sha256(f"{sys.version} {sys.prefix} {ROOT} {candidates} {extras}".encode())
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


def torch_candidates(given: str) -> list[str]:
    """pip requirements (with options) for torch, to be tried in this order; `given` is the user's own, or empty.

    On a Linux x86_64 machine without an NVIDIA driver the CPU build comes first, a tenth of the other's size. Not every index
    has it by its name.
    """
    if given:
        return [given]
    plain = f"torch=={TORCH_VERSION}"
    wants_cpu_build = (platform.system(), platform.machine()) == ("Linux", "x86_64") and not NVIDIA_DRIVER.exists()
    return [f"{plain}+cpu", plain] if wants_cpu_build else [plain]


def bytes_needed(torch: str) -> int:
    """Disk space for .venv with this build of torch; for a plain requirement, on most indexes, that is the CUDA build."""
    is_cuda_build = torch == f"torch=={TORCH_VERSION}" and (platform.system(), platform.machine()) == (
        "Linux",
        "x86_64",
    )
    return CUDA_BYTES_NEEDED if is_cuda_build else CPU_BYTES_NEEDED


def check_free_space(torch: str) -> None:
    """Raise SetupError unless there is room for .venv with this torch."""
    needed, free = bytes_needed(torch), shutil.disk_usage(ROOT).free
    if free < needed:
        raise SetupError(
            f"not enough disk space in {ROOT} for {torch} and the rest: about {needed / 1e9:.0f} GB are needed, "
            f"{free / 1e9:.1f} GB are free"
        )


def make_venv(clear: bool) -> None:
    """Make .venv, or make it again if it is to be cleared, is broken or belongs to another Python version."""
    probe = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    if VENV_PYTHON.exists() and not clear:
        found = subprocess.run([VENV_PYTHON, "-c", probe], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip() == "{}.{}".format(*sys.version_info[:2]):
            return
    step("making .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])


def install_torch(candidates: list[str], installed: str) -> str:
    """Install torch, by the first of these requirements that pip's index has, and the build tools.

    `installed`: the requirement by which .venv has torch already, or empty. Returns the one by which it has it now.
    """
    for torch in candidates:
        if torch != installed:
            check_free_space(torch)
        command = [*PIP_INSTALL, *torch.split(), "numpy<2", *BUILD_REQUIREMENTS]
        try:
            step(f"installing {torch} and the build tools", command)
            return torch
        except SetupError:
            log = read(LOG)
            is_absent = f"No matching distribution found for {torch}" in log and not has_network_error(log)
            if torch == candidates[-1] or not is_absent:
                raise
            print(f"==> pip's index has no {torch}", flush=True)
    raise AssertionError("no candidates")


def install_packages(torch: str, extras: str, cuda: str) -> None:
    """Install everything else and the project in editable mode, which builds the native modules."""
    step("building and installing pagedcore", [*PIP_INSTALL, *EDITABLE, f"{ROOT}[{extras}]", *torch.split()], cuda)


def rebuild(cuda: str) -> None:
    """Build the native modules again; CMake recompiles only what has changed."""
    step("building the native modules", [*PIP_INSTALL, "--no-deps", *EDITABLE, str(ROOT)], cuda)


def step(name: str, command: list[str], cuda: str = "OFF") -> None:
    """Run one long command, its standard output shown, and say how long it took."""
    print(f"==> {name}", flush=True)
    start = time.monotonic()
    LOG.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "SKBUILD_CMAKE_DEFINE": f"PAGEDCORE_CUDA={cuda}"}
    if cuda == "ON":
        environment["CUDACXX"] = find_nvcc()
    with LOG.open("w") as log:
        status = subprocess.run(command, cwd=ROOT, env=environment, stderr=log, check=False).returncode
    if status != 0:
        raise SetupError(f"{name} failed: {explain(LOG.read_text(errors='replace'), status)}")
    print(f"==> {name}: {time.monotonic() - start:.0f} s", flush=True)


def explain(log: str, status: int) -> str:
    """The reason in the output of a failed pip, as one line."""
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return (
            f"no space left on the disk of {ROOT}, about {CPU_BYTES_NEEDED / 1e9:.0f} GB are needed, "
            f"{CUDA_BYTES_NEEDED / 1e9:.0f} GB with a CUDA build of torch"
        )
    if has_network_error(log) or "Could not find a version" in log:
        return f"a package could not be downloaded; check the network or pip's index ({last_error(log)})"
    compiler_errors = [line for line in log.splitlines() if ": error: " in line or "CMake Error" in line]
    if compiler_errors:
        return f"{compiler_errors[0].strip()} (all of it: {LOG})"
    return f"{last_error(log) or f'exit status {status}'} (all of it: {LOG})"


def has_network_error(log: str) -> bool:
    """True if pip could not reach its index."""
    signs = ("Max retries exceeded", "NewConnectionError", "NameResolutionError", "ReadTimeoutError", "ProxyError")
    return any(sign in log for sign in signs)


def last_error(log: str) -> str:
    """The last line that pip marks as an error."""
    errors = [line.strip() for line in log.splitlines() if line.startswith(("ERROR", "error", "OSError"))]
    return errors[-1] if errors else ""


def set_up(torch: str, extras: str, cuda: str) -> None:
    """Bring .venv up to date; raises SetupError."""
    check_python_version()
    candidates = torch_candidates(torch)
    packages_stamp = VENV / f".pagedcore-{extras.replace(',', '-')}"
    native_stamp, torch_stamp = VENV / ".pagedcore-native", VENV / ".pagedcore-torch"
    packages, native = packages_fingerprint(candidates, extras), native_fingerprint(cuda)
    packages_current = VENV_PYTHON.exists() and read(packages_stamp) == packages
    if packages_current and read(native_stamp) == native:
        return
    missing = missing_prerequisites()
    if missing:
        raise SetupError("\nerror: ".join(map(str, missing)))
    if cuda == "ON" and not find_nvcc():
        raise SetupError(
            "nvcc, which compiles the kernels for a GPU, was not found on the PATH, in CUDACXX or as "
            f"{NVCC}; install the CUDA toolkit (12.0 or newer), or go on without the GPU: CUDA=OFF"
        )
    if packages_current:
        rebuild(cuda)
    else:
        # A build of torch that is not wanted any more would do for pip, whose versions are the same.
        make_venv(clear=read(torch_stamp) not in ("", *candidates))
        installed = install_torch(candidates, read(torch_stamp))
        torch_stamp.write_text(installed)
        install_packages(installed, extras, cuda)
        packages_stamp.write_text(packages)
    native_stamp.write_text(native)


def read(path: Path) -> str:
    """The text of a file, empty if there is none."""
    return path.read_text(errors="replace") if path.is_file() else ""


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="", help="pip requirement and options for torch (default: what suits)")
    parser.add_argument("--extras", default="serve", help="extras of pyproject.toml, separated by commas")
    parser.add_argument(
        "--cuda", default="", help="build the CUDA kernels: ON, OFF, or empty (where there is an NVIDIA driver)"
    )
    parser.add_argument("--list-missing", action="store_true", help="only print the Debian packages that are missing")
    arguments = parser.parse_args()
    if arguments.list_missing:
        print(*(missing.package for missing in missing_prerequisites()))
        return 0
    # Compiling for GPUs takes minutes, and a machine without a driver could not use the result.
    cuda = arguments.cuda or ("ON" if NVIDIA_DRIVER.exists() else "OFF")
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
