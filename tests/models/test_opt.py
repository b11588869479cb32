"""OPT: greedy tokens of the engine against transformers, checkpoints under all their names, configurations, real shapes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pagedcore import LLM, SamplingParams, TokensPrompt
from pagedcore.errors import ConfigError
from pagedcore.execution.kv_cache import block_bytes
from pagedcore.layers.activations import ActivationBuffers
from pagedcore.layers.linear import Placement
from pagedcore.models.config import ModelConfig
from pagedcore.models.loader import load_model
from pagedcore.models.registry import MODELS
from tests.models import tiny
from tests.reference.paged import PagedModel

NUM_TOKENS = 40
PROMPT = [2, 99, 3, 3, 42]
META = Placement(torch.bfloat16, torch.device("meta"))

# The published models that differ in more than size: config.json's fields that say so.
OPT_CONFIGS: dict[str, dict[str, Any]] = {
    "opt-125m": {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "opt-350m": {
        "hidden_size": 1024,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 512,
    },
    "opt-2.7b": {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32},
    "opt-13b": {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40, "num_attention_heads": 40},
}
LLAMA_13B = {
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 2048,
}


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """OpenMP's threads wait by spinning: next to a busy neighbour, one thread is many times faster than two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(folder: Path) -> torch.Tensor:
    model = PagedModel(folder, torch.float32)
    return model.logits([model.add(PROMPT)], [len(PROMPT)])


@pytest.mark.parametrize("variant", ["opt", "opt-heads-of-80", "opt-norm-behind", "opt-350m"])
def test_greedy_tokens_equal_transformers_in_batches_and_chunks(variant: str, tmp_path: Path) -> None:
    reference = tiny.make(variant, tmp_path, init_std=0.3)  # with small weights, every output is one token repeated
    rng = random.Random(variant)
    prompts = [[2, *(rng.randrange(tiny.VOCAB_SIZE) for _ in range(length))] for length in (0, 1, 15, 16, 70, 150)]
    expected = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False
            )
            expected.append(out[0, len(prompt) :].tolist())
    llm = LLM(
        str(tmp_path),
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=4,
        max_num_batched_tokens=24,
        max_num_seqs=4,
        num_gpu_blocks_override=100,
    )
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS, detokenize=False),
        use_tqdm=False,
    )
    llm.shutdown()
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), "the prompts are told apart"


@pytest.mark.parametrize("variant", ["opt", "opt-350m"])
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(variant: str, tmp_path: Path) -> None:
    reference = tiny.make(variant, tmp_path)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    rng = random.Random(variant)
    prompts = [[rng.randrange(tiny.VOCAB_SIZE) for _ in range(60)] for _ in range(16)]
    # Both models with the same weights: those of bfloat16.
    reference.load_state_dict({name: values.float() for name, values in half.state_dict().items()})
    with torch.inference_mode():
        exact, theirs = (m(torch.tensor(prompts)).logits[:, -1].float() for m in (reference, half))
    model = PagedModel(tmp_path, torch.bfloat16)
    rows = [model.add(prompt) for prompt in prompts]
    model.logits(rows, [59] * len(rows))
    ours = model.logits(rows, [1] * len(rows))
    assert (ours - exact).abs().mean() <= 1.25 * (theirs - exact).abs().mean()


def test_last_position_is_the_last_row_of_the_table(tmp_path: Path) -> None:
    reference = tiny.make("opt", tmp_path, max_position_embeddings=32)
    prompt = [(7 * i) % tiny.VOCAB_SIZE for i in range(32)]
    model = PagedModel(tmp_path, torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0, -1:]
    torch.testing.assert_close(model.logits([model.add(prompt)], [32]), expected, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="max_model_len must be at most 32 "):
        LLM(str(tmp_path), skip_tokenizer_init=True, max_model_len=33)


def test_checkpoints_without_the_prefix_and_with_a_stored_tied_head(tmp_path: Path) -> None:
    tiny.make("opt-350m", tmp_path)
    expected = logits(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    bare = {name.removeprefix("model."): values for name, values in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare | {"decoder.version": torch.tensor([3.0])}, file)
    assert torch.equal(logits(tmp_path), expected)
    save_file(tensors | {"lm_head.weight": torch.zeros(tiny.VOCAB_SIZE, 72)}, file)
    assert torch.equal(logits(tmp_path), expected)


@pytest.mark.parametrize(
    ("variant", "change", "text"),
    [
        ("opt", {"model.decoder.layers.1.fc1.bias": None}, r"missing: model\.decoder\.layers\.1\.fc1\.bias$"),
        ("opt", {"model.decoder.final_layer_norm.bias": None}, r"missing: model\.decoder\.final_layer_norm\.bias$"),
        ("opt-untied", {"lm_head.weight": None}, r"missing: lm_head\.weight$"),
        ("opt-350m", {"model.decoder.project_in.weight": None}, r"missing: model\.decoder\.project_in\.weight$"),
        (
            "opt-350m",
            {"model.decoder.final_layer_norm.bias": (192,)},
            "decoder.final_layer_norm.bias is not part of OPT",
        ),
        ("opt", {"model.decoder.project_out.weight": (72, 192)}, "decoder.project_out.weight is not part of OPT"),
        ("opt-without-biases", {"model.decoder.layers.0.fc2.bias": (192,)}, "fc2.bias is not part of OPT"),
        ("opt", {"decoder.layers.0.fc2.bias": (192,)}, "fc2.bias is not part of OPTForCausalLM, or is there twice"),
        (
            "opt",
            {"model.decoder.embed_positions.weight": (256, 192)},
            r"embed_positions.weight must have shape \[258, 192\] by config.json, has \[256, 192\]",
        ),
    ],
    ids=str,
)
def test_missing_unknown_double_and_misshapen_tensors_are_named(
    variant: str, change: dict[str, tuple[int, ...] | None], text: str, tmp_path: Path
) -> None:
    tiny.make(variant, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=text):
        logits(tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"activation_function": "gelu"}, "activation_function must be 'relu', got 'gelu'"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine must be true.*, got False"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm must be false.*, got True"),
        ({"do_layer_norm_before": "no"}, "do_layer_norm_before must be true or false, got 'no'"),
        ({"num_attention_heads": 7}, r"num_attention_heads must divide hidden_size \(768\), got 7"),
        (
            {"num_attention_heads": 32},
            "num_attention_heads must give a head_dim that is a multiple of 16.* is 24, got 32",
        ),
        ({"ffn_dim": None}, "ffn_dim must be an integer at least 1, got None"),
        ({"word_embed_proj_dim": 0}, "word_embed_proj_dim must be an integer at least 1, got 0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
    ],
    ids=str,
)
def test_configurations_that_are_not_supported_are_refused_by_name(changes: dict[str, Any], text: str) -> None:
    values = {"architectures": ["OPTForCausalLM"], "vocab_size": 50272} | OPT_CONFIGS["opt-125m"]
    assert ModelConfig.from_values(values).norm_before
    with pytest.raises(ConfigError, match=f"config.json: {text}"):
        ModelConfig.from_values(values | changes)


@pytest.mark.parametrize("name", [*OPT_CONFIGS, "llama-13b"])
def test_published_shapes_are_built_with_the_tensors_of_transformers(name: str, tmp_path: Path) -> None:
    """On no device: names and shapes of all weights, and what a 13-billion-parameter model takes beside them."""
    if name == "llama-13b":
        theirs = transformers.LlamaConfig(**LLAMA_13B, architectures=["LlamaForCausalLM"])
    else:
        theirs = transformers.OPTConfig(**OPT_CONFIGS[name], architectures=["OPTForCausalLM"])
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    model = MODELS[config.architecture](config, config.max_context_len, META)
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(theirs)
    expected = {key: tuple(parameter.shape) for key, parameter in reference.named_parameters()}
    assert {key: slot.full_shape for key, slot in model.weight_slots()} == expected
    if name.endswith("13b"):
        assert block_bytes(config, 1, META) == 819_200  # the paper, section 3: 800 KB a token
        assert ActivationBuffers(config, 2048, 256, META).num_bytes < 500 << 20


def test_random_weights_of_a_shape_without_files(tmp_path: Path) -> None:
    tiny.make("opt-350m", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = ModelConfig.from_folder(tmp_path)
    placement = Placement(torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        model = load_model(tmp_path, config, 64, placement, "dummy", 1)
    weights = dict(model.named_parameters())
    assert all(weights[name].eq(1).all() for name in weights if name.endswith("norm.weight"))
    assert all(
        values.isfinite().all() and values.std() > 0.01 for name, values in weights.items() if "norm" not in name
    )
    assert json.loads((tmp_path / "config.json").read_text())["word_embed_proj_dim"] == 72
