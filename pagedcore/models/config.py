"""What a model folder's config.json says about the model, checked and in the project's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedcore.errors import ConfigError

HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 16, 256  # what the attention kernels are made for
MAX_EOS_TOKEN_IDS = 64
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (RoFormer, section 3.2) and how it is stretched beyond the trained context.

    `factor` and the fields behind it mean what they mean in Hugging Face's `rope_parameters`.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ArchitectureTraits:
    """Where an architecture differs from Llama. `None`: its config.json says."""

    qkv_bias: bool | None
    output_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool = False
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    default_max_position_embeddings: int = 2048
    windowed_only_if_used: bool = False  # sliding_window counts only with use_sliding_window


ARCHITECTURES = {
    "LlamaForCausalLM": ArchitectureTraits(qkv_bias=None, output_bias=None, mlp_bias=None),
    "Qwen2ForCausalLM": ArchitectureTraits(
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        default_max_position_embeddings=32768,
        windowed_only_if_used=True,
    ),
    "Qwen3ForCausalLM": ArchitectureTraits(
        qkv_bias=None,
        output_bias=None,
        mlp_bias=False,
        qk_norm=True,
        default_head_dim=128,
        default_max_position_embeddings=32768,
        windowed_only_if_used=True,
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of a decoder-only model.

    `dtype` is the checkpoint's: "float32", "bfloat16" or "float16". `eos_token_ids` joins those of config.json and of
    generation_config.json.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read config.json and, where there is one, generation_config.json of a Hugging Face model folder.

        Raises:
            ConfigError: no folder, a missing or broken file, or a field whose value is not supported.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"model must be the path of a Hugging Face model folder; {str(folder)!r} is not a folder")
        source, generation = folder / "config.json", folder / "generation_config.json"
        eos = _read_json(generation) if generation.exists() else {}
        return cls.from_values(_read_json(source), eos, str(source))

    @classmethod
    def from_values(
        cls, values: Mapping[str, Any], generation: Mapping[str, Any] | None = None, source: str = "config.json"
    ) -> ModelConfig:
        """Build from the parsed files. Raises ConfigError naming field and value."""
        fields = _Fields(values, source)
        architecture = _architecture(fields)
        traits = ARCHITECTURES[architecture]
        _refuse_unsupported(fields, traits)
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
        head_dim = fields.integer("head_dim", traits.default_head_dim or hidden_size // num_heads)
        if head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
            allowed = f"a multiple of {HEAD_DIM_MULTIPLE}, at most {MAX_HEAD_DIM}"
            raise fields.error("head_dim", f"must be {allowed}, as the attention kernels take it, is {head_dim}")
        max_position_embeddings = fields.integer("max_position_embeddings", traits.default_max_position_embeddings)
        attention_bias = fields.boolean("attention_bias", False)
        eos = fields.token_ids("eos_token_id")
        eos += _Fields(generation or {}, "generation_config.json").token_ids("eos_token_id")
        vocab_size = fields.integer("vocab_size")
        # Some models list ids that their logits do not reach; they can never be drawn.
        eos_token_ids = tuple(token_id for token_id in dict.fromkeys(eos) if token_id < vocab_size)
        if len(eos_token_ids) > MAX_EOS_TOKEN_IDS:
            raise fields.error("eos_token_id", f"must be at most {MAX_EOS_TOKEN_IDS} ids, are {len(eos_token_ids)}")
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(fields, max_position_embeddings),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            qkv_bias=attention_bias if traits.qkv_bias is None else traits.qkv_bias,
            output_bias=attention_bias if traits.output_bias is None else traits.output_bias,
            mlp_bias=fields.boolean("mlp_bias", False) if traits.mlp_bias is None else traits.mlp_bias,
            qk_norm=traits.qk_norm,
            dtype=_dtype(fields),
            eos_token_ids=eos_token_ids,
        )

    @property
    def max_context_len(self) -> int:
        """The longest context the model is meant for, rope scaling included.

        Linear and YaRN scaling stretch the trained context by `factor`, unless max_position_embeddings says so already.
        """
        if self.rope.rope_type == "linear":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_position_embeddings * self.rope.factor))
        return self.max_position_embeddings


class _Fields:
    """Typed access to the values of one JSON file; every refusal names file, field and value."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` where it is absent or null."""
        value = self._values.get(name)
        return default if value is None else value

    def error(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{self._source}: {name} {problem}, got {self._values.get(name)!r}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "must be an integer at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
            raise self.error(name, "must be a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def token_ids(self, name: str) -> list[int]:
        """One id, a list of ids, or null."""
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
            raise self.error(name, "must be a token id or a list of them")
        return ids

    def section(self, name: str) -> _Fields | None:
        """A nested object, or None where it is absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return _Fields(value, f"{self._source}: {name}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: model must be the path of a Hugging Face model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, holds a {type(values).__name__}")
    return values


def _architecture(fields: _Fields) -> str:
    names = fields.get("architectures", [])
    if isinstance(names, list):
        for name in names:
            if name in ARCHITECTURES:
                return str(name)
    raise fields.error("architectures", f"must name one of {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(fields: _Fields, traits: ArchitectureTraits) -> None:
    if fields.get("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "must be 'silu'")
    windowed = fields.get("use_sliding_window", False) if traits.windowed_only_if_used else True
    if windowed and fields.get("sliding_window") is not None:
        raise fields.error("sliding_window", "is not supported: every layer must attend to the whole context")
    layer_types = fields.get("layer_types", [])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise fields.error("layer_types", "must all be 'full_attention'")
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "is not supported: give the unquantized weights")
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "must be 1")


def _dtype(fields: _Fields) -> str:
    # transformers 5 writes `dtype`, older versions `torch_dtype`.
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name, "float32")
    if value not in ("float32", "bfloat16", "float16"):
        raise fields.error(name, "must be float32, bfloat16 or float16")
    return str(value)


def _rope(fields: _Fields, max_position_embeddings: int) -> RopeConfig:
    # transformers 5 writes `rope_parameters`, older versions `rope_theta` beside `rope_scaling`.
    section = fields.section("rope_parameters") or fields.section("rope_scaling")
    theta = fields.number("rope_theta", 10000.0)
    if section is None:
        return RopeConfig(theta=theta)
    kind = "rope_type" if section.get("rope_type") is not None else "type"
    rope_type = section.get(kind, "default")
    if rope_type not in ROPE_TYPES:
        raise section.error(kind, f"must be one of {', '.join(ROPE_TYPES)}")
    if section.get("partial_rotary_factor", 1.0) != 1.0:
        raise section.error("partial_rotary_factor", "must be 1")
    theta = section.number("rope_theta", theta)
    if rope_type == "default":
        return RopeConfig(theta=theta)
    original = section.integer("original_max_position_embeddings", max_position_embeddings)
    if fields.get("original_max_position_embeddings") is not None:
        original = fields.integer("original_max_position_embeddings")
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        # YaRN configs may leave the factor to the ratio of the two context lengths.
        factor=section.number("factor", max_position_embeddings / original if rope_type == "yarn" else None),
        original_max_position_embeddings=original,
        low_freq_factor=section.number("low_freq_factor", None if rope_type == "llama3" else 1.0),
        high_freq_factor=section.number("high_freq_factor", None if rope_type == "llama3" else 4.0),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        attention_factor=section.optional_number("attention_factor"),
        mscale=section.optional_number("mscale"),
        mscale_all_dim=section.optional_number("mscale_all_dim"),
        truncate=section.boolean("truncate", True),
    )
