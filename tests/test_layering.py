"""The layers import only what lies below them, and the control plane never imports torch or Triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the top down: a module may import from its own layer and from those that come after it.
LAYERS = (
    ("pagedcore_triton",),
    ("pagedcore.llm",),
    ("pagedcore.build",),
    ("pagedcore.execution",),
    ("pagedcore.serve",),
    ("pagedcore.models", "pagedcore.layers"),
    ("pagedcore.ops",),
    ("pagedcore.engine",),
    ("pagedcore.output_text", "pagedcore.text", "pagedcore.config"),
    ("pagedcore.chat_template", "pagedcore.template_sandbox", "pagedcore.json_text", "pagedcore.vllm_arguments"),
    ("pagedcore.errors", "pagedcore._core", "pagedcore._kernels"),
)


def layer_of(module: str) -> int | None:
    for level, prefixes in enumerate(LAYERS):
        if any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes):
            return level
    return None


def imports_of(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def sources() -> dict[str, Path]:
    found = {}
    for base in (ROOT, ROOT / "backend"):
        for package in ("pagedcore", "pagedcore_triton"):
            for path in sorted((base / package).rglob("*.py")):
                parts = path.relative_to(base).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_point_downwards(module: str) -> None:
    level = layer_of(module)
    if module == "pagedcore":
        return  # the package itself only forwards names
    assert level is not None, f"{module} is in no layer"
    for imported in imports_of(sources()[module]):
        other = layer_of(imported)
        if other is None:
            continue
        assert other >= level, f"{module} (layer {LAYERS[level]}) imports {imported} (layer {LAYERS[other]})"


@pytest.mark.parametrize(
    "module", ["pagedcore", "pagedcore.engine.engine_thread", "pagedcore.serve.__main__", "pagedcore.config"]
)
def test_control_plane_and_launcher_do_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'triton_python_backend_utils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_only_the_backend_knows_triton() -> None:
    for module, path in sources().items():
        if not module.startswith("pagedcore_triton"):
            assert not any("triton_python_backend_utils" in name for name in imports_of(path)), module
