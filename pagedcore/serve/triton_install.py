"""Provides a tritonserver: an installed one, or one assembled in the cache from a wheel, for this Python version."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pagedcore.serve.cache import (
    PinnedWheel,
    SetupError,
    building_folder,
    cache_root,
    download_wheel,
    require_free_space,
    scratch_folder,
)

_log = logging.getLogger(__name__)

SUPPORTED_PYTHONS = ("3.10", "3.11", "3.12")
_WHEEL = PinnedWheel("nvidia-pytriton==0.7.0", "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df")
_TRITON_VERSION = "2.51.0"
_BYTES_NEEDED = 300_000_000
STUB_NAME = "triton_python_backend_stub"


@dataclass(frozen=True)
class TritonInstallation:
    """A tritonserver binary, the folder of its backends, and the libpython that the Python backend's stub loads."""

    binary: Path
    backend_directory: Path
    libpython: Path


def ensure_tritonserver(binary: Path | None = None) -> TritonInstallation:
    """Return the installation of `binary`, or, without one, of the pinned wheel, which is unpacked if need be.

    Raises:
        SetupError: no network, no disk space, no libpython, or `binary` does not suit this Python.
    """
    libpython = find_libpython()
    if binary is not None:
        return _installed(binary, libpython)
    python = _python_version()
    if python not in SUPPORTED_PYTHONS:
        raise SetupError(f"Python {python} is not supported; use one of {', '.join(SUPPORTED_PYTHONS)}")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SetupError(
            f"there is no tritonserver wheel for {platform.system()} {platform.machine()}, only for Linux x86_64; "
            "give an installed one (make serve TRITONSERVER=/path/to/tritonserver) or see deploy/"
        )
    home = cache_root() / f"tritonserver-{_TRITON_VERSION}"
    if not home.is_dir():
        with building_folder(home) as partial:
            if partial is not None:
                _log.info("Obtaining tritonserver %s (55 MB), once", _TRITON_VERSION)
                require_free_space(partial, _BYTES_NEEDED, "tritonserver")
                with scratch_folder() as scratch:
                    _unpack(download_wheel(_WHEEL, scratch), partial)
    server = home / "pytriton" / "tritonserver"
    return TritonInstallation(server / "bin" / "tritonserver", server / f"backends-{python}", libpython)


def find_libpython() -> Path:
    """Return the shared library of this Python, which the stub embeds.

    Raises:
        SetupError: this Python was built without one, or it is not installed.
    """
    soname = f"libpython{_python_version()}.so.1.0"
    library_dir = sysconfig.get_config_var("LIBDIR") or ""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    for folder in (library_dir, os.path.join(library_dir, multiarch), os.path.join(sys.base_prefix, "lib")):
        if (path := Path(folder, soname)).is_file():
            return path
    raise SetupError(
        f"{soname} not found: tritonserver embeds Python and needs its shared library; "
        f"on Debian or Ubuntu: apt-get install libpython{_python_version()}"
    )


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _installed(binary: Path, libpython: Path) -> TritonInstallation:
    binary = binary.resolve()
    if not os.access(binary, os.X_OK) or binary.is_dir():
        raise SetupError(f"TRITONSERVER={binary} is not an executable file")
    backends = binary.parent.parent / "backends"
    stub = backends / "python" / STUB_NAME
    if not stub.is_file():
        raise SetupError(f"{binary} comes without the Python backend: {stub} not found")
    check_stub_python(stub)
    return TritonInstallation(binary, backends, libpython)


def check_stub_python(stub: Path) -> None:
    """Raise SetupError if the Python backend's stub embeds another Python version than this one."""
    match = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    if match is not None and match[1].decode() != _python_version():
        raise SetupError(
            f"{stub} embeds Python {match[1].decode()}, but this environment has Python {_python_version()}; "
            f"make the environment with: make setup PYTHON=python{match[1].decode()}"
        )


def _unpack(wheel: Path, into: Path) -> None:
    """Unpack the server and give it one backend folder per supported Python; its RPATHs rely on the wheel's layout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    server = into / "pytriton" / "tritonserver"
    (server / "bin" / "tritonserver").chmod(0o755)
    for python in SUPPORTED_PYTHONS:
        backend = server / f"backends-{python}" / "python"
        backend.mkdir(parents=True)
        for file in (server / "backends" / "python").iterdir():
            os.link(file, backend / file.name)
        stub = shutil.copy2(server / "python_backend_stubs" / python / STUB_NAME, backend / STUB_NAME)
        Path(stub).chmod(0o755)
