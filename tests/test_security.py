"""What the serving path must never contain: deserialization that runs code, evaluation, shells, code from model folders."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError
from tests.test_layering import imports_of, sources

RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}
ATTRIBUTES = {"torch.load", "torch.save", "np.load", "numpy.load", "os.system", "os.popen"} | {
    f"torch.{name}" for name in ("jit.load", "jit.script", "hub.load", "export.load")
}


def violations(path: Path) -> list[str]:
    """Lines of a source file that could run what somebody else wrote."""
    found = [f"import of {module}" for module in sorted(imports_of(path)) if module.partition(".")[0] in RUNS_CODE]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in CALLS:
            found.append(f"line {node.lineno}: {function.id}()")
        if ast.unparse(function) in ATTRIBUTES:
            found.append(f"line {node.lineno}: {ast.unparse(function)}()")
        for keyword in node.keywords:
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                found.append(f"line {node.lineno}: {keyword.arg}=")
    return found


@pytest.mark.parametrize("module", sorted(sources()))
def test_no_source_can_run_what_somebody_else_wrote(module: str) -> None:
    assert violations(sources()[module]) == []


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import pickle\nfrom yaml import load\nimport torch, os, subprocess\n"
        "torch.load('x')\ntorch.export.load('x')\n"
        "os.system('x')\neval('1')\nsubprocess.run('x', shell=True)\nf(trust_remote_code=True)\n"
    )
    assert len(violations(bad)) == 9


def test_code_from_a_model_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="trust_remote_code must be false"):
        EngineConfig.from_dict({"model": "x", "trust_remote_code": True})
