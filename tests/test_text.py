"""pagedcore.text against transformers' tokenizers and brute force."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from pagedcore.errors import ConfigError, RequestError
from pagedcore.output_text import IncrementalDetokenizer, OutputText, PromptEnd, StopStrings, prompt_end
from pagedcore.serve.default_model import ensure_default_model
from pagedcore.text import Tokenizer, load_tokenizer

_CORPUS = ["The quick brown fox jumps over the lazy dog.", "Stop here, please!  Two  spaces.", "naïve café über"] * 4
_TEXTS = [
    "Hello world",
    " leading space",
    "a\n\n b",
    "naïve 日本語 🙂👩‍👩‍👧 ÿ",
    "",
    "  ",
    "<|im_start|>user",
    "x" * 300,
]

_END = {"__type": "AddedToken", "content": "<|end|>", "lstrip": False, "normalized": False, "rstrip": False}
_NAMES = ["smollm2", "byte_level", "byte_fallback"]


def _write(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _byte_level_folder(root: Path) -> Path:
    """As Llama 3's and Qwen2's: byte-level BPE, a BOS token from the post processor, an EOS only in the config."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_tokens(["[日 本]"])  # its text is not written in the byte-level alphabet
    backend.enable_truncation(8)  # a leftover of training that must not cut prompts
    return _write(root / "byte_level", backend, {"bos_token": "<s>", "eos_token": _END})


def _opt_folder(root: Path) -> Path:
    """As OPT's: GPT-2's byte-level BPE, `</s>` (id 2) both as BOS token and as EOS."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(_CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "unk_token": "</s>", "pad_token": "<pad>"}
    folder = _write(root / "opt", backend, {"bos_token": "</s>", "eos_token": "</s>", **config})
    # The class of the model decides which tokenizer transformers makes.
    (folder / "config.json").write_text(json.dumps({"model_type": "opt"}))
    return folder


def _byte_fallback_folder(root: Path) -> Path:
    """As Llama 2's: SentencePiece pieces with byte fallback, where decoding drops the first space."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # byte tokens are ordinary ones
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}
    return _write(root / "byte_fallback", backend, config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "smollm2": ensure_default_model(),
        "byte_level": _byte_level_folder(root),
        "byte_fallback": _byte_fallback_folder(root),
        "opt": _opt_folder(root),
    }


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", [*_NAMES, "opt"])
def test_encodes_and_decodes_as_transformers(folders: dict[str, Path], loaded: dict[str, Tokenizer], name: str) -> None:
    ours, theirs = loaded[name], AutoTokenizer.from_pretrained(folders[name])
    for text in _TEXTS:
        for add_special_tokens in (True, False):
            ids = theirs.encode(text, add_special_tokens=add_special_tokens, truncation=False)
            assert ours.encode(text, add_special_tokens) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    for token_id in theirs.all_special_ids:
        assert ours.is_special(token_id)


def test_prompts_of_opt_begin_with_its_end_of_sequence_token(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["opt"]
    ids = tokenizer.encode("The quick brown fox")
    assert (ids[0], tokenizer.eos_token_id) == (2, 2)
    assert 2 not in ids[1:] + tokenizer.encode("The quick brown fox", add_special_tokens=False)
    assert tokenizer.decode(ids) == "The quick brown fox"


def test_loading_imports_no_torch() -> None:
    code = "import sys, pagedcore.text as text; text.load_tokenizer(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(ensure_default_model())], check=True)


@pytest.mark.parametrize("name", [*_NAMES, "opt"])
@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.text(max_size=3) | st.sampled_from(["x", " ", "\x04", "<|im_start|>", "[日 本]"]), max_size=5)
)
def test_no_text_has_fewer_tokens_than_foreseen(loaded: dict[str, Tokenizer], name: str, pieces: list[str]) -> None:
    text = "".join(piece * 40 for piece in pieces)
    assert loaded[name].fewest_tokens(text) <= len(loaded[name].encode(text, add_special_tokens=False))


def test_a_text_far_too_long_is_known_without_encoding_it(loaded: dict[str, Tokenizer]) -> None:
    """SmolLM2's longest tokens are 80 spaces or so; where unknown characters become one token, nothing is known."""
    assert loaded["smollm2"].fewest_tokens("\x04" * 100_000) == 0  # it has no token for that one
    assert loaded["smollm2"].fewest_tokens("x" * 100_000) > 1000
    assert loaded["byte_fallback"].fewest_tokens("x" * 100_000) == 0


@pytest.mark.parametrize("name", _NAMES)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=30), data=st.data())
def test_pieces_add_up_to_what_follows_the_prompt(
    loaded: dict[str, Tokenizer], name: str, text: str, data: st.DataObject
) -> None:
    """At any cut between prompt and output, also inside a character, which then belongs to the output."""
    tokenizer = loaded[name]
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_end(tokenizer, ids[:cut]))
    pieces = [detokenizer.push([token_id]) for token_id in ids[cut:]]
    whole = tokenizer.decode(ids)
    assume("\ufffd" not in whole)  # SmolLM2's vocabulary lacks some bytes
    # With byte fallback, one unfinished character spoils the decoding of the finished ones before it.
    prompts = [tokenizer.decode(ids[:end]).rstrip("\ufffd") for end in range(max(0, cut - 4), cut + 1)]
    assert max(prompts, key=len) + "".join(pieces) == whole or cut == len(ids)
    assert detokenizer.flush() == "" or cut == len(ids)
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("name", ["smollm2", "byte_level"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_random_tokens_add_up_to_the_whole(loaded: dict[str, Tokenizer], name: str, data: st.DataObject) -> None:
    """Random ids in random groups: broken UTF-8 mostly, control tokens, ids without a token."""
    tokenizer = loaded[name]
    single_bytes = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    size = tokenizer.vocab_size
    token_id = st.integers(0, size) | st.integers(size - 3, size + 50) | st.sampled_from(single_bytes)
    groups = data.draw(st.lists(st.lists(token_id, max_size=4), max_size=20))
    skip = data.draw(st.booleans())
    detokenizer = IncrementalDetokenizer(tokenizer, PromptEnd(), skip)
    text = "".join(detokenizer.push(group) for group in groups) + detokenizer.flush()
    assert text == tokenizer.decode([i for group in groups for i in group], skip)


def test_an_unfinished_character_is_held_back_and_then_replaced(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["byte_level"]
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) == 4
    detokenizer = IncrementalDetokenizer(tokenizer, PromptEnd())
    assert [detokenizer.push([token_id]) for token_id in ids[:3]] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_the_first_space_is_dropped_only_at_the_start_of_a_text(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["byte_fallback"]
    bos, *ids = tokenizer.encode("dog")
    assert IncrementalDetokenizer(tokenizer, prompt_end(tokenizer, [bos])).push(ids) == "dog"
    assert IncrementalDetokenizer(tokenizer, prompt_end(tokenizer, [bos, *ids])).push(ids) == " dog"


def test_token_text_shows_a_token_as_it_stands_inside_a_text(loaded: dict[str, Tokenizer]) -> None:
    for name in ("smollm2", "byte_fallback"):
        tokenizer = loaded[name]
        ids = tokenizer.encode("The quick brown fox", add_special_tokens=False)
        assert "".join(map(tokenizer.token_text, ids)).lstrip() == "The quick brown fox"
        assert tokenizer.token_text(tokenizer.vocab_size) == ""


_letters = st.text("ab", max_size=3)
_stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=500, deadline=None)
@given(stops=_stops, pieces=st.lists(_letters, max_size=8), include=st.booleans())
def test_stop_strings_match_brute_force(stops: list[str], pieces: list[str], include: bool) -> None:
    text = "".join(pieces)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    matched = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len) if ends else None
    expected = text if matched is None else text[: ends[0] - (0 if include else len(matched))]

    stop_strings, shown, found = StopStrings(stops, include), "", None
    for count, piece in enumerate(pieces):
        more, found = stop_strings.push(piece)
        shown += more
        assert expected.startswith(shown)
        if found is not None:
            break
        seen = "".join(pieces[: count + 1])
        held = max(k for k in range(len(seen) + 1) if any(s.startswith(seen[len(seen) - k :]) for s in stops))
        assert shown == seen[: len(seen) - held], "holds back more or less than it has to"
    assert found == matched
    assert shown + ("" if found else stop_strings.flush()) == expected


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab c🙂", max_size=20), stop=st.text("ab c🙂", min_size=1, max_size=3), data=st.data())
def test_output_text_ends_at_the_token_that_completes_the_stop_string(
    loaded: dict[str, Tokenizer], text: str, stop: str, data: st.DataObject
) -> None:
    tokenizer = loaded["byte_level"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    min_tokens = data.draw(st.integers(0, 4))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(ids) + 1, max_size=len(ids) + 1))
    free = tokenizer.decode(ids[:min_tokens]).rstrip("\ufffd")  # shown before stop strings count
    at = text.find(stop, len(free))
    needed = next((n for n in range(min_tokens, len(ids) + 1) if stop in tokenizer.decode(ids[:n])[len(free) :]), 0)

    output = OutputText(tokenizer, PromptEnd(), stop=[stop], min_tokens=min_tokens)
    shown, start = "", 0
    while start < len(ids) and output.stopped_by is None:
        group = ids[start : start + sizes.pop()]
        start += len(group)
        shown += output.push(group, final=start == len(ids))
    assert shown == (text if at < 0 else text[:at])
    assert output.stopped_by == (None if at < 0 else stop)
    assert output.num_tokens == (len(ids) if at < 0 else needed)


@pytest.mark.parametrize("name", ["smollm2", "byte_level"])
@settings(max_examples=200, deadline=None)
@given(data=st.data(), include=st.booleans())
def test_stop_strings_in_random_bytes_match_brute_force(
    loaded: dict[str, Tokenizer], name: str, data: st.DataObject, include: bool
) -> None:
    """Random tokens, most of them single bytes and so broken UTF-8, and stop strings cut from the text they make."""
    tokenizer = loaded[name]
    single_bytes = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    token_id = st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(single_bytes)
    ids = data.draw(st.lists(token_id, min_size=1, max_size=30))
    text = tokenizer.decode(ids)
    cuts = data.draw(st.lists(st.tuples(st.integers(0, len(text)), st.integers(1, 4)), max_size=3))
    stops = [text[begin : begin + size] for begin, size in cuts if text[begin:]] or ["no such text"]
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
    matched = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len) if ends else None
    expected = text if matched is None else text[: ends[0] - (0 if include else len(matched))]

    output = OutputText(tokenizer, PromptEnd(), stop=stops, include_stop_str_in_output=include)
    shown = ""
    for i, token in enumerate(ids):
        shown += output.push([token], final=i == len(ids) - 1)
        assert expected.startswith(shown)
        if output.stopped_by is not None:
            break
    assert (shown, output.stopped_by) == (expected, matched)


def test_the_stop_tokens_own_text_is_hidden(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["smollm2"]
    ids = tokenizer.encode("one two")
    output = OutputText(tokenizer, PromptEnd())
    assert output.push(ids, final=True, hide_last=True) == tokenizer.decode(ids[:-1])
    assert output.num_tokens == len(ids)


def test_chat_template_renders_as_transformers(folders: dict[str, Path], loaded: dict[str, Tokenizer]) -> None:
    messages = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Hello"}]
    theirs = AutoTokenizer.from_pretrained(folders["smollm2"])
    for add_generation_prompt in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert loaded["smollm2"].apply_chat_template(messages, add_generation_prompt) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].missing.deeper }}", "no attribute"),
        ("{% if %}", "broken"),
    ],
)
def test_chat_template_errors_are_the_requests(
    folders: dict[str, Path], tmp_path: Path, template: str | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(folders["byte_level"], tmp_path / "model")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(folder)
    assert ("chat template is broken" in caplog.text) == (reason == "broken")  # said at load, which goes on
    with pytest.raises(RequestError, match=reason):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_chat_templates_of_tokenizer_config_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["byte_level"], tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ bos_token }}yes"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "Hi"}]) == "<s>yes"


def test_a_folder_that_cannot_be_used_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copy(folders["smollm2"] / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json must hold a JSON object"):
        load_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="WordPiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": {"x": 1}}, r"eos_token must be a text, an object with a \"content\" or null, got \{'x': 1\}"),
        ({"pad_token": 3}, "pad_token must be a text"),
        ({"chat_template": 3}, "chat_template must be a text or a list of named ones, got int"),
        ({"chat_template": [{"name": "default"}]}, "chat_template must be a text"),
        ({"added_tokens_decoder": ["a"]}, "added_tokens_decoder must be an object of tokens by id"),
        ({"added_tokens_decoder": {"99999": "x"}}, "added_tokens_decoder must be an object of tokens by id"),
        (b"{% if \xff %}", r"chat_template\.jinja cannot be read"),
    ],
)
def test_a_broken_tokenizer_config_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any] | bytes, message: str
) -> None:
    """As JSON changes of tokenizer_config.json, or as the bytes of chat_template.jinja."""
    folder = shutil.copytree(folders["byte_level"], tmp_path / "tokenizer")
    if isinstance(changes, bytes):
        (folder / "chat_template.jinja").write_bytes(changes)
    else:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(folder)
