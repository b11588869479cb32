"""The loader: strict about names, shapes and files; sharded and single files are equal; random weights are seeded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore import LLM
from pagedcore.errors import ConfigError
from pagedcore.layers.linear import Placement, RowLinear
from pagedcore.models.causal_lm import CausalLM
from pagedcore.models.config import ModelConfig
from pagedcore.models.loader import _weight_files, check_weights, load_model
from pagedcore.models.registry import MODELS
from tests.models import tiny
from tests.reference.paged import PagedModel

Tensors = dict[str, torch.Tensor]
PROMPT = [5, 99, 3, 3, 42]


def load(folder: Path, load_format: str = "safetensors", seed: int = 0) -> CausalLM:
    config = ModelConfig.from_folder(folder)
    with torch.inference_mode():
        return load_model(folder, config, 64, Placement(torch.float32, torch.device("cpu")), load_format, seed)


def logits(folder: Path) -> torch.Tensor:
    model = PagedModel(folder, torch.float32)
    return model.logits([model.add(PROMPT)], [len(PROMPT)])


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> None:
    """Split model.safetensors into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(2):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        part = names[i::2]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_sharded_and_single_files_are_equal(tmp_path: Path) -> None:
    tiny.make("qwen2", tmp_path)
    single = logits(tmp_path)
    shard(tmp_path)
    assert torch.equal(logits(tmp_path), single)


def test_tied_head_may_be_stored_and_frequencies_are_ignored(tmp_path: Path) -> None:
    tiny.make("llama-tied", tmp_path)
    expected = logits(tmp_path)

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)

    rewrite(tmp_path, add)
    assert torch.equal(logits(tmp_path), expected)


def test_other_dtypes_are_converted(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({k: v.bfloat16().float() for k, v in tensors.items()}))
    expected = logits(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    assert torch.equal(logits(tmp_path), expected)


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def add(name: str, shape: tuple[int, ...]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop("model.layers.1.self_attn.k_proj.weight"), r"missing: model\.layers\.1\.self_attn\.k_proj\.weight$"),
        (drop("model.norm.weight"), r"missing: model\.norm\.weight$"),
        (drop("lm_head.weight"), r"missing: lm_head\.weight$"),
        (add("model.layers.0.self_attn.q_proj.bias", (192,)), "self_attn.q_proj.bias is not part of LlamaForCausalLM"),
        (add("model.layers.9.mlp.up_proj.weight", (136, 96)), "layers.9.mlp.up_proj.weight is not part of"),
        (
            add("model.layers.0.mlp.down_proj.weight", (96, 135)),
            r"down_proj.weight must have shape \[96, 136\] by config.json, has \[96, 135\]",
        ),
        (
            add("model.layers.0.self_attn.v_proj.weight", (96, 96)),
            r"v_proj.weight must have shape \[64, 96\] by config.json, has \[96, 96\]",
        ),
    ],
)
def test_missing_unknown_and_misshapen_tensors_are_named(
    change: Callable[[Tensors], None], text: str, tmp_path: Path
) -> None:
    tiny.make("llama", tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ConfigError, match=text):
        load(tmp_path)


def test_many_missing_tensors_make_one_line(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)

    def drop_mlp(tensors: Tensors) -> None:
        for name in [name for name in tensors if "mlp" in name]:
            del tensors[name]

    rewrite(tmp_path, drop_mlp)
    with pytest.raises(ConfigError, match=r"and 4 more$"):
        load(tmp_path)


def test_truncated_and_broken_files_are_named(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for broken in (content[:-100], content[: len(content) // 2], content[:5], b"", b"not a safetensors file at all"):
        file.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"model\.safetensors is truncated or not a safetensors file"):
            load(tmp_path)


def test_missing_shard_and_broken_index_are_named(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"are missing: model-00002-of-00002\.safetensors"):
        load(tmp_path)
    for text in ("{", "{}", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ConfigError, match=r"index\.json cannot be read"):
            load(tmp_path)


def test_folder_without_safetensors_says_so(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only safetensors weights can be loaded"):
        load(tmp_path)


def test_random_weights_need_no_files_and_depend_on_the_seed_only(tmp_path: Path) -> None:
    tiny.make("qwen3", tmp_path)
    (tmp_path / "model.safetensors").unlink()

    def embedding(seed: int) -> torch.Tensor:
        return load(tmp_path, "dummy", seed).embed_tokens.weight

    assert torch.equal(embedding(1), embedding(1))
    assert not torch.equal(embedding(1), embedding(2))
    assert 0.01 < embedding(1).std() < 0.05


def test_random_layers_differ_from_each_other(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    linears = [module for module in load(tmp_path, "dummy").modules() if isinstance(module, RowLinear)]
    packed = [linear.packed.data for linear in linears if linear.packed is not None]
    assert len(packed) == 6
    assert not torch.equal(packed[1], packed[3])


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", "..", 7])
def test_an_index_names_files_of_its_folder_only(name: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ConfigError, match=r"weight_map must name safetensors files of this folder, got"):
        _weight_files(tmp_path)


@pytest.mark.parametrize("variant", [*tiny.VARIANTS])
def test_the_weights_that_must_fit_are_those_that_are_loaded(variant: str, tmp_path: Path) -> None:
    tiny.make(variant, tmp_path)
    config, placement = ModelConfig.from_folder(tmp_path), Placement(torch.float32, torch.device("cpu"))
    model = MODELS[config.architecture](config, 64, placement)
    needed = sum(weight.nbytes for weight in model.parameters())
    check_weights(config, 64, placement, needed)
    with pytest.raises(ConfigError, match=r"model: its weights need 0.0 GiB in float32"):
        check_weights(config, 64, placement, needed - 1)


def test_a_model_that_is_too_large_says_by_how_much_before_anything_is_allocated(tmp_path: Path) -> None:
    hidden, layers, intermediate, vocab = 65536, 200, 262144, 128000
    tiny.make("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
    }
    config |= {"num_attention_heads": 512, "num_key_value_heads": 64, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    layer = 2 * hidden * hidden + 2 * hidden * 64 * 128 + 3 * hidden * intermediate + 2 * hidden
    gib = 2 * (layers * layer + 2 * vocab * hidden + hidden) / 2**30
    with pytest.raises(ConfigError, match=rf"model: its weights need {gib:,.1f} GiB in bfloat16, and .* GiB too few"):
        LLM(str(tmp_path), dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, device="cpu")
