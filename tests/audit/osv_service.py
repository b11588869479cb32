"""The query of the OSV API, answered from a checkout of a database of advisories, for machines without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

Advisory = Mapping[str, Any]  # as the OSV schema has it


class AdvisoryDatabase:
    """Advisories in the layout of the Python Packaging Advisory Database: vulns/<package>/<id>.yaml.

    Raises FileNotFoundError if the folder is not one, so that nothing counts as clean because nothing was looked at.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("vulns/*/*.yaml"))
        if not paths:
            raise FileNotFoundError(f"no advisories (vulns/<package>/<id>.yaml) in {folder}")
        self._paths: dict[str, list[Path]] = {}
        for path in paths:
            self._paths.setdefault(canonicalize_name(path.parent.name), []).append(path)

    def affecting(self, package: str, version: str) -> list[Advisory]:
        """The advisories, those withdrawn included, that name this version of the package."""
        paths = self._paths.get(canonicalize_name(package), [])
        advisories = [yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) for path in paths]
        return [advisory for advisory in advisories if is_affected(advisory, package, Version(version))]


def is_affected(advisory: Advisory, package: str, version: Version) -> bool:
    """Whether a version is listed, or lies in a range; the rest of a local version ("+cpu") does not matter."""
    public = Version(version.public)
    for affected in advisory.get("affected", []):
        if canonicalize_name(affected["package"]["name"]) != canonicalize_name(package):
            continue
        if any(_equals(listed, public) for listed in affected.get("versions", [])):
            return True
        ranges = [r["events"] for r in affected.get("ranges", []) if r["type"] == "ECOSYSTEM"]
        if any(_is_within(events, public) for events in ranges):
            return True
    return False


def _equals(listed: str, version: Version) -> bool:
    try:
        return Version(listed) == version
    except InvalidVersion:  # some very old releases have such names; none of them is installed
        return False


def _is_within(events: list[Mapping[str, str]], version: Version) -> bool:
    """The algorithm of the OSV schema: the last event at or before the version decides."""
    is_within = False
    for kind, bound in sorted(
        ((kind, Version(bound)) for event in events for kind, bound in event.items()), key=lambda event: event[1]
    ):
        if kind == "introduced" and version >= bound:
            is_within = True
        elif (kind == "fixed" and version >= bound) or (kind == "last_affected" and version > bound):
            is_within = False
    return is_within


@contextmanager
def osv_service(database: AdvisoryDatabase) -> Iterator[str]:
    """The address of a service on loopback that answers `POST /v1/query`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = database.affecting(query["package"]["name"], query["version"])
            body = json.dumps({"vulns": found} if found else {}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A line for each package is of no use."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
