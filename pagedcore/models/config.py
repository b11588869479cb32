"""What a model folder's config.json says about the model, checked and in the project's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedcore.errors import ConfigError
from pagedcore.models.config_fields import Fields, read_json

HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 16, 256  # what the attention kernels are made for
MAX_EOS_TOKEN_IDS = 64
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
OPT = "OPTForCausalLM"
OPT_NORM_EPS = 1e-5  # no field of its config.json


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
    """Where a relative of Llama differs from it. `None`: its config.json says."""

    qkv_bias: bool | None
    output_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool = False
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    default_max_position_embeddings: int = 2048
    windowed_only_if_used: bool = False  # sliding_window counts only with use_sliding_window


LLAMA_FAMILY = {
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
ARCHITECTURES = (*LLAMA_FAMILY, OPT)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of a decoder-only model.

    `dtype` is the checkpoint's: "float32", "bfloat16" or "float16". `eos_token_ids` joins those of config.json and of
    generation_config.json. `rope` is None where positions are learned embeddings. Where `word_embed_proj_dim` is not
    hidden_size, token embeddings of that size are projected to and from the hidden states. Without `norm_before`, norms
    come behind attention and MLP and the residual addition, not before them.
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
    norm_eps: float
    rope: RopeConfig | None
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    gated_mlp: bool
    norm_before: bool
    word_embed_proj_dim: int
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
        eos = read_json(generation) if generation.exists() else {}
        return cls.from_values(read_json(source), eos, str(source))

    @classmethod
    def from_values(
        cls, values: Mapping[str, Any], generation: Mapping[str, Any] | None = None, source: str = "config.json"
    ) -> ModelConfig:
        """Build from the parsed files. Raises ConfigError naming field and value."""
        fields = Fields(values, source)
        architecture = _architecture(fields)
        _refuse_unsupported(fields)
        eos_token_ids = _eos_token_ids(fields, Fields(generation or {}, "generation_config.json"))
        if architecture == OPT:
            return cls._from_opt(fields, eos_token_ids)
        return cls._from_llama_family(architecture, fields, eos_token_ids)

    @classmethod
    def _from_llama_family(cls, architecture: str, fields: Fields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
        traits = LLAMA_FAMILY[architecture]
        _refuse_unsupported_of_llama(fields, traits)
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
        head_dim = fields.integer("head_dim", traits.default_head_dim or hidden_size // num_heads)
        _check_head_dim(fields, "head_dim", head_dim)
        max_position_embeddings = fields.integer("max_position_embeddings", traits.default_max_position_embeddings)
        attention_bias = fields.boolean("attention_bias", False)
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(fields, max_position_embeddings),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            qkv_bias=attention_bias if traits.qkv_bias is None else traits.qkv_bias,
            output_bias=attention_bias if traits.output_bias is None else traits.output_bias,
            mlp_bias=fields.boolean("mlp_bias", False) if traits.mlp_bias is None else traits.mlp_bias,
            qk_norm=traits.qk_norm,
            gated_mlp=True,
            norm_before=True,
            word_embed_proj_dim=hidden_size,
            dtype=_dtype(fields),
            eos_token_ids=eos_token_ids,
        )

    @classmethod
    def _from_opt(cls, fields: Fields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
        _refuse_unsupported_of_opt(fields)
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        if hidden_size % num_heads:
            raise fields.error("num_attention_heads", f"must divide hidden_size ({hidden_size})")
        head_dim = hidden_size // num_heads
        _check_head_dim(fields, "num_attention_heads", head_dim)
        bias = fields.boolean("enable_bias", True)
        return cls(
            architecture=OPT,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("ffn_dim"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.integer("max_position_embeddings", 2048),
            norm_eps=OPT_NORM_EPS,
            rope=None,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bias,
            qk_norm=False,
            gated_mlp=False,
            norm_before=fields.boolean("do_layer_norm_before", True),
            word_embed_proj_dim=fields.integer("word_embed_proj_dim", hidden_size),
            dtype=_dtype(fields),
            eos_token_ids=eos_token_ids,
        )

    @property
    def max_context_len(self) -> int:
        """The longest context the model is meant for, rope scaling included.

        Linear and YaRN scaling stretch the trained context by `factor`, unless max_position_embeddings says so already.
        """
        if self.rope is None:
            return self.max_position_embeddings
        if self.rope.rope_type == "linear":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_position_embeddings * self.rope.factor))
        return self.max_position_embeddings


def _architecture(fields: Fields) -> str:
    names = fields.get("architectures", [])
    if isinstance(names, list):
        for name in names:
            if name in ARCHITECTURES:
                return str(name)
    raise fields.error("architectures", f"must name one of {', '.join(ARCHITECTURES)}")


def _eos_token_ids(fields: Fields, generation: Fields) -> tuple[int, ...]:
    """Those of both files, without those that the logits do not reach: some models list them, none can be drawn."""
    vocab_size = fields.integer("vocab_size")
    ids = fields.token_ids("eos_token_id") + generation.token_ids("eos_token_id")
    eos_token_ids = tuple(token_id for token_id in dict.fromkeys(ids) if token_id < vocab_size)
    if len(eos_token_ids) > MAX_EOS_TOKEN_IDS:
        raise fields.error("eos_token_id", f"must be at most {MAX_EOS_TOKEN_IDS} ids, are {len(eos_token_ids)}")
    return eos_token_ids


def _check_head_dim(fields: Fields, field: str, head_dim: int) -> None:
    """`field` is the one that decides it."""
    if head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
        allowed = f"a multiple of {HEAD_DIM_MULTIPLE}, at most {MAX_HEAD_DIM}"
        subject = "must be" if field == "head_dim" else "must give a head_dim that is"
        raise fields.error(field, f"{subject} {allowed}, as the attention kernels take it, is {head_dim}")


def _refuse_unsupported(fields: Fields) -> None:
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "is not supported: give the unquantized weights")


def _refuse_unsupported_of_llama(fields: Fields, traits: ArchitectureTraits) -> None:
    if fields.get("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "must be 'silu'")
    windowed = fields.get("use_sliding_window", False) if traits.windowed_only_if_used else True
    if windowed and fields.get("sliding_window") is not None:
        raise fields.error("sliding_window", "is not supported: every layer must attend to the whole context")
    layer_types = fields.get("layer_types", [])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise fields.error("layer_types", "must all be 'full_attention'")
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "must be 1")


def _refuse_unsupported_of_opt(fields: Fields) -> None:
    if fields.get("activation_function", "relu") != "relu":
        raise fields.error("activation_function", "must be 'relu'")
    if not fields.boolean("layer_norm_elementwise_affine", True):
        raise fields.error("layer_norm_elementwise_affine", "must be true: norms without weights are not supported")
    if fields.boolean("_remove_final_layer_norm", False):
        reason = "must be false: checkpoints from before transformers 4.20.1 are not supported"
        raise fields.error("_remove_final_layer_norm", reason)


def _dtype(fields: Fields) -> str:
    # transformers 5 writes `dtype`, older versions `torch_dtype`.
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name, "float32")
    if value not in ("float32", "bfloat16", "float16"):
        raise fields.error(name, "must be float32, bfloat16 or float16")
    return str(value)


def _rope_theta(fields: Fields, default: float) -> float:
    theta = fields.number("rope_theta", default)
    if theta <= 1.0:
        raise fields.error("rope_theta", "must be a number above 1")
    return theta


def _rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    # transformers 5 writes `rope_parameters`, older versions `rope_theta` beside `rope_scaling`.
    section = fields.section("rope_parameters") or fields.section("rope_scaling")
    theta = _rope_theta(fields, 10000.0)
    if section is None:
        return RopeConfig(theta=theta)
    kind = "rope_type" if section.get("rope_type") is not None else "type"
    rope_type = section.get(kind, "default")
    if rope_type not in ROPE_TYPES:
        raise section.error(kind, f"must be one of {', '.join(ROPE_TYPES)}")
    if section.get("partial_rotary_factor", 1.0) != 1.0:
        raise section.error("partial_rotary_factor", "must be 1")
    theta = _rope_theta(section, theta)
    if rope_type == "default":
        return RopeConfig(theta=theta)
    original = section.integer("original_max_position_embeddings", max_position_embeddings)
    if fields.get("original_max_position_embeddings") is not None:
        original = fields.integer("original_max_position_embeddings")
    low = section.number("low_freq_factor", None if rope_type == "llama3" else 1.0)
    high = section.number("high_freq_factor", None if rope_type == "llama3" else 4.0)
    if rope_type == "llama3" and high <= low:
        raise section.error("high_freq_factor", f"must be above low_freq_factor, {low:g}")
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        # YaRN configs may leave the factor to the ratio of the two context lengths.
        factor=section.number("factor", max_position_embeddings / original if rope_type == "yarn" else None),
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        attention_factor=section.optional_number("attention_factor"),
        mscale=section.optional_number("mscale"),
        mscale_all_dim=section.optional_number("mscale_all_dim"),
        truncate=section.boolean("truncate", True),
    )
