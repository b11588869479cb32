"""The packages that serving needs, by their metadata."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "pagedcore"
EXTRAS = frozenset({"serve"})


def installed() -> dict[str, str]:
    """Name and version of everything that pagedcore[serve] needs, directly or not, as installed here."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    pending = [(PROJECT, extra) for extra in ("", *EXTRAS)]
    while pending:
        name, extra = pending.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found[name] = metadata.version(name)
        for requirement in _requirements(name, extra):
            needed = canonicalize_name(requirement.name)
            pending += [(needed, wanted) for wanted in ("", *requirement.extras)]
    del found[PROJECT]
    return dict(sorted(found.items()))


def lowest() -> dict[str, str]:
    """Name and lowest version that pyproject.toml allows of everything that it names for serving."""
    bounds: dict[str, str] = {}
    for extra in ("", *EXTRAS):
        for requirement in _requirements(PROJECT, extra):
            (bound,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
            bounds[canonicalize_name(requirement.name)] = bound
    return dict(sorted(bounds.items()))


def _requirements(name: str, extra: str) -> list[Requirement]:
    """What a package needs with that extra; with "", without any."""
    requirements = [Requirement(text) for text in metadata.requires(name) or []]
    return [r for r in requirements if _applies(r, extra)]


def _applies(requirement: Requirement, extra: str) -> bool:
    if requirement.marker is None:
        return extra == ""
    without = requirement.marker.evaluate({"extra": ""})
    return without if extra == "" else requirement.marker.evaluate({"extra": extra}) and not without
