"""`make install`: puts pagedcore into an installed tritonserver as a backend of its own, under vLLM's name or another."""

from __future__ import annotations

import argparse
import re
import sys
import sysconfig
from pathlib import Path

from pagedcore.serve.cache import SetupError
from pagedcore.serve.launcher import report_errors
from pagedcore.serve.triton_install import STUB_NAME, check_stub_python

MARKER = "pagedcore as a backend of Triton, written by make install"
_MODEL = '''"""{marker}. To undo: delete this folder."""

import site
import sys

# The packages of the environment that this was installed from, before those of the Python that Triton embeds.
_known = len(sys.path)
site.addsitedir({packages!r})
sys.path[:0] = sys.path[_known:]

from pagedcore_triton.model import TritonPythonModel
'''


def install_backend(backends: Path, name: str) -> Path:
    """Make `backends`/`name` a backend that runs this environment's pagedcore; a former installation is replaced.

    Returns its folder.

    Raises:
        SetupError: no Python backend of this Python version in `backends`, or something else is there already.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise SetupError(f"NAME must be letters, digits, _ and -, got {name!r}")
    stub = backends / "python" / STUB_NAME
    if not stub.is_file():
        raise SetupError(f"BACKENDS={backends} is not a folder of Triton backends: {stub} not found")
    check_stub_python(stub)
    folder = backends / name
    if folder.exists() and not is_ours(folder):
        raise SetupError(
            f"{folder} holds another backend, which is not overwritten; to keep it aside: mv {folder} {backends}-{name}.saved"
        )
    try:
        folder.mkdir(exist_ok=True)
        content = _MODEL.format(marker=MARKER, packages=sysconfig.get_path("purelib"))
        (folder / "model.py").write_text(content, encoding="utf-8")
    except PermissionError as error:
        raise SetupError(f"{error.filename} cannot be written; run the installation as its owner") from error
    return folder


def is_ours(folder: Path) -> bool:
    """Whether a backend folder comes from `install_backend`."""
    model = folder / "model.py"
    return model.is_file() and MARKER in model.read_text(encoding="utf-8", errors="replace")


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pagedcore.serve.install_backend", description=__doc__)
    parser.add_argument("--backends", type=Path, required=True, help="for example /opt/tritonserver/backends")
    parser.add_argument("--name", default="pagedcore", help="vllm to take vllm_backend's place (default: %(default)s)")
    given = parser.parse_args(arguments)

    def install() -> None:
        folder = install_backend(given.backends, given.name)
        print(f'Installed {folder}; models with backend: "{given.name}" use it from their next load on.')
        print(f"To undo: rm -r {folder}")

    return report_errors(install)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
