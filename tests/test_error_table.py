"""docs/operations.md explains every error that users can see."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ERRORS = {
    "ConfigError",
    "DeadlineError",
    "EngineDeadError",
    "NonFiniteLogitsError",
    "OverloadedError",
    "RequestError",
    "SetupError",
}
# Of the Python interface: its users see a traceback, not a server's answer.
PYTHON_ONLY = {"llm.py"}


def template(node: ast.expr) -> str:
    """A message with … for what is only known when the error is raised."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def messages() -> dict[str, str]:
    """The text of every error by where it is made; those that only pass another one's text on are left out."""
    found = {}
    for path in sorted([*(ROOT / "pagedcore").rglob("*.py"), *(ROOT / "backend").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                text = template(node.args[0])
                if set(text) != {"…"} and path.name not in PYTHON_ONLY:
                    found[f"{path.name}:{node.lineno}"] = text
    return found


def documented() -> list[re.Pattern[str]]:
    """The texts in the first column of the tables of errors."""
    section = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("\n## Errors\n")[2]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    texts = [text for cell in cells for text in re.findall(r"`([^`]*)`", cell)]
    return [re.compile(re.escape(text).replace("…", ".*")) for text in texts]


def test_every_error_is_in_the_table() -> None:
    patterns = documented()
    missing = {where: text for where, text in messages().items() if not any(p.fullmatch(text) for p in patterns)}
    assert len(messages()) > 100
    assert not missing
