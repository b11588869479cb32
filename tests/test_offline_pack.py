"""What is packed for a GPU machine without a package index."""

from __future__ import annotations

import struct
from pathlib import Path

from benchmarks.offline.pack import keep_architecture

PTX, CODE = 1, 2


def fatbin(*entries: tuple[int, int, bytes]) -> bytes:
    """A section of a CUDA library: pieces of this kind, architecture and content."""
    body = b""
    for kind, architecture, content in entries:
        header = struct.pack("<HHIQ", kind, 1, 64, len(content)) + bytes(12) + struct.pack("<I", architecture)
        body += header + bytes(64 - len(header)) + content
    return b"\x50\xed\x55\xba" + struct.pack("<HHQ", 1, 16, len(body)) + body


def test_code_for_other_gpus_becomes_zeros(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    before, between, after = b"ELF" * 5, b"strings", b"end"
    first = ((PTX, 80, b"ptx of one"), (CODE, 80, b"code 80"), (CODE, 90, b"code 90"))
    only_ptx = ((PTX, 80, b"ptx of another"), (CODE, 80, b"other code"))
    library.write_bytes(before + fatbin(*first) + between + fatbin(*only_ptx) + after)
    keep_architecture(library, 90)
    kept = ((PTX, 80, bytes(10)), (CODE, 80, bytes(7)), (CODE, 90, b"code 90"))
    kept_ptx = ((PTX, 80, b"ptx of another"), (CODE, 80, bytes(10)))
    assert library.read_bytes() == before + fatbin(*kept) + between + fatbin(*kept_ptx) + after


def test_what_looks_like_a_section_and_is_none_stays(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    content = b"\x50\xed\x55\xba" + struct.pack("<HHQ", 7, 16, 1 << 40) + b"text"
    library.write_bytes(content)
    keep_architecture(library)
    assert library.read_bytes() == content
