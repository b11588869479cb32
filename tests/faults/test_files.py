"""Model folders that somebody has broken or forged: each is refused in one line that names the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pagedcore.errors import ConfigError
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.text import load_tokenizer
from tests.models import tiny
from tests.models.test_loader import load

Header = dict[str, Any]
_NAME = "model.norm.weight"


def with_header(header: bytes, claimed: int | None = None) -> Callable[[bytes], bytes]:
    """A file with another header, of a length that it claims, before the same tensors."""

    def change(content: bytes) -> bytes:
        length = struct.unpack_from("<Q", content)[0]
        return struct.pack("<Q", len(header) if claimed is None else claimed) + header + content[8 + length :]

    return change


def with_tensor(**values: Any) -> Callable[[bytes], bytes]:
    """One tensor is described in another way."""

    def change(content: bytes) -> bytes:
        length = struct.unpack_from("<Q", content)[0]
        header: Header = json.loads(content[8 : 8 + length])
        header[_NAME] |= values
        return with_header(json.dumps(header).encode())(content)

    return change


@pytest.mark.parametrize(
    "change",
    [
        with_header(b"{}", claimed=2**63),
        with_header(b"{}", claimed=2**31),
        with_header(b"{}", claimed=101 << 20),
        with_header(b""),
        with_header(b"[" * 100_000),
        with_header(b'{"a":' * 100_000),
        with_header(b"\xff\xfe{}"),
        with_header(b'{"x": 1}'),
        with_tensor(data_offsets=[0, 2**62]),
        with_tensor(data_offsets=[-1, 383]),
        with_tensor(data_offsets=[384, 0]),
        with_tensor(data_offsets=[0, 384]),  # those of another tensor
        with_tensor(shape=[2**40, 2**40]),
        with_tensor(shape=[-96]),
        with_tensor(dtype="P9"),
    ],
)
def test_forged_safetensors_are_refused_by_name(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ConfigError, match=r"model\.safetensors") as raised:
        load(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_checkpoint_of_integers_is_refused_by_name(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(with_tensor(dtype="I32")(file.read_bytes()))
    with pytest.raises(ConfigError, match=f"{_NAME} must hold floating-point numbers"):
        load(tmp_path)


def truncated(text: str) -> str:
    return text[: len(text) // 2]


@pytest.mark.parametrize(
    "change",
    [
        truncated,
        lambda _: "",
        lambda _: "[]",
        lambda _: "null",
        lambda _: "[" * 100_000,
        lambda text: text.replace('"type": "BPE"', '"type": "Pickle"'),
        lambda text: text.replace('"vocab": {', '"vocab": {"\ud800": 7, '),
    ],
    ids=["truncated", "empty", "list", "null", "deep", "type", "surrogate"],
)
def test_forged_tokenizers_are_refused_by_name(change: Callable[[str], str], tmp_path: Path) -> None:
    source = ensure_default_model()
    text = (source / "tokenizer.json").read_text(encoding="utf-8")
    changed = change(text)
    assert changed != text
    (tmp_path / "tokenizer.json").write_text(changed, encoding="utf-8", errors="surrogatepass")
    (tmp_path / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
