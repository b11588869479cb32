"""The memory of the paged KV cache, and the plan of where a device's memory goes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from pagedcore import ops
from pagedcore.config import EngineConfig
from pagedcore.engine.step_plan import Header
from pagedcore.errors import ConfigError
from pagedcore.execution.batch import block_copies, block_swaps
from pagedcore.layers.activations import ActivationBuffers
from pagedcore.layers.attention import LayerKVCache
from pagedcore.layers.linear import Placement
from pagedcore.models.config import ModelConfig

CPU_KV_CACHE_BYTES = 4 << 30
GRAPH_BYTES = 256 << 20  # room that is kept for the captured graphs


class KVCache:
    """Keys and values of every layer, in blocks of `block_size` tokens.

    One tensor [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]; K is [:, 0], V is [:, 1]. It holds
    whatever the memory held: slots no token was written to are never read. `host` is another one, of `num_host_blocks`
    blocks, for preempted sequences.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, placement: Placement, num_host_blocks: int = 0
    ) -> None:
        num_kv_heads = placement.share(config.num_kv_heads, "num_key_value_heads")
        shape = (config.num_layers, 2, num_blocks, num_kv_heads, block_size, config.head_dim)
        self.tensor = torch.empty(shape, dtype=placement.dtype, device=placement.device)
        if placement.device.type == "cpu":
            ops.request_huge_pages(self.tensor)  # attention jumps from block to block
        self.layers = [LayerKVCache(layer[0], layer[1]) for layer in self.tensor]
        host_shape = (*shape[:2], num_host_blocks, *shape[3:])
        self.host = torch.empty(host_shape, dtype=placement.dtype, pin_memory=placement.device.type == "cuda")

    def prepare(self, buffer: torch.Tensor, header: Header) -> None:
        """Carry out what a step's packed buffer says of blocks before anything is written: swaps out, swaps in, copies.

        buffer: int32, on the cache's device.
        """
        if header.num_swap_outs or header.num_swap_ins:
            outs, ins = block_swaps(buffer, header)
            ops.swap_blocks(self.tensor, self.host, outs)
            ops.swap_blocks(self.host, self.tensor, ins)
        if header.num_copies:
            ops.copy_blocks(self.tensor, block_copies(buffer, header))


def swap_cost_tokens(block: int, num_weights: float, operations_per_byte: float) -> float:
    """How many tokens a device computes in the time in which a block of `block` bytes goes to the host and comes back.

    A token takes two operations a weight; `operations_per_byte`: what the device computes while it moves a byte.
    """
    return 2 * block * operations_per_byte / (2 * num_weights)


def block_bytes(config: ModelConfig, block_size: int, placement: Placement) -> int:
    """Bytes of one block on one rank: K and V of all layers for `block_size` tokens."""
    num_kv_heads = placement.share(config.num_kv_heads, "num_key_value_heads")
    return 2 * config.num_layers * num_kv_heads * config.head_dim * block_size * placement.dtype.itemsize


@dataclass(frozen=True)
class MemoryPlan:
    """Where the memory goes, in bytes; fixed from here on."""

    weights: int
    activations: int
    inputs: int
    block: int
    num_blocks: int
    block_size: int
    workspace: int = 0  # of the kernels
    draws: int = 0  # what penalties, bans and log probabilities need beside the logits
    graphs: int = 0
    swap_space: int = 0  # in the host's memory
    other: int = 0  # a GPU's context, code and libraries, and other processes there

    def with_graphs(self, graphs: int) -> MemoryPlan:
        return dataclasses.replace(self, graphs=graphs)

    @property
    def kv_cache(self) -> int:
        return self.num_blocks * self.block

    def __str__(self) -> str:
        parts = (
            ("weights", self.weights),
            ("KV cache", self.kv_cache),
            ("activations", self.activations),
            ("step inputs", self.inputs),
            ("workspace", self.workspace),
            ("draws", self.draws),
            ("graphs", self.graphs),
            ("swap space", self.swap_space),
            ("context and libraries", self.other),
        )
        sizes = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts if size)
        tokens = self.num_blocks * self.block_size
        return f"memory: {sizes}; {self.num_blocks:,} blocks of {self.block_size} tokens hold {tokens:,} tokens"


def plan_memory(
    config: EngineConfig,
    *,
    weights: int,
    activations: int,
    inputs: int,
    block: int,
    max_model_len: int,
    free_bytes: int,
    swap_space: int = 0,
) -> MemoryPlan:
    """Decide how many blocks of `block` bytes the KV cache gets of a host that had `free_bytes` before loading.

    num_gpu_blocks_override where it is set, whatever it is; else kv_cache_memory_bytes; else the share
    gpu_memory_utilization of what weights, activations and inputs leave, at most what max_num_seqs sequences of
    max_model_len tokens can fill, and at most CPU_KV_CACHE_BYTES or one such sequence: a host's memory is not ours alone.

    Raises:
        ConfigError: more is asked for than is free, or there is not room for a single sequence of max_model_len tokens.
    """
    room = max(free_bytes - weights - activations - inputs - swap_space, 0)
    blocks_per_sequence = -(-max_model_len // config.block_size)
    share = min(int(room * config.gpu_memory_utilization), max(CPU_KV_CACHE_BYTES, blocks_per_sequence * block))
    num_blocks = _num_blocks(config, block, max_model_len, room, share)
    return MemoryPlan(weights, activations, inputs, block, num_blocks, config.block_size, swap_space=swap_space)


def plan_gpu_memory(
    config: EngineConfig,
    *,
    weights: int,
    activations: int,
    inputs: int,
    workspace: int,
    draws: int,
    swap_space: int,
    block: int,
    max_model_len: int,
    used_bytes: int,
    total_bytes: int,
) -> MemoryPlan:
    """Decide how many blocks of `block` bytes the KV cache gets of a GPU with `used_bytes` of its `total_bytes` in use.

    As `plan_memory`, but that gpu_memory_utilization is the share of the whole GPU that is to be in use in the end, by whom
    ever, and GRAPH_BYTES of it are kept for the graphs. Raises ConfigError likewise.
    """
    room = max(total_bytes - used_bytes - GRAPH_BYTES, 0)
    share = int(total_bytes * config.gpu_memory_utilization) - used_bytes - GRAPH_BYTES
    is_automatic = config.num_gpu_blocks_override is None and config.kv_cache_memory_bytes is None
    if is_automatic and share < block:
        raise ConfigError(
            f"gpu_memory_utilization must leave room for a KV cache: {config.gpu_memory_utilization} of "
            f"{total_bytes / 2**30:,.1f} GiB is {(block - share) / 2**30:,.2f} GiB less than the model "
            f"({used_bytes / 2**30:,.1f} GiB in use: {weights / 2**30:,.1f} GiB of weights, "
            f"{(activations + draws) / 2**30:,.1f} GiB of room for steps), the graphs and one block need"
        )
    num_blocks = _num_blocks(config, block, max_model_len, room, share)
    other = used_bytes - weights - activations - inputs - workspace - draws
    return MemoryPlan(
        weights,
        activations,
        inputs,
        block,
        num_blocks,
        config.block_size,
        workspace=workspace,
        draws=draws,
        swap_space=swap_space,
        other=other,
    )


def check_activations(
    model_config: ModelConfig, max_tokens: int, max_rows: int, placement: Placement, free_bytes: int
) -> None:
    """Raise ConfigError if steps of `max_tokens` tokens and `max_rows` rows need more than the `free_bytes` of the device."""
    without_memory = dataclasses.replace(placement, device=torch.device("meta"))
    needed = ActivationBuffers(model_config, max_tokens, max_rows, without_memory).num_bytes
    if needed > free_bytes:
        raise ConfigError(
            f"max_num_batched_tokens = {max_tokens} and max_num_seqs = {max_rows} need {needed / 2**30:,.1f} GiB for "
            f"activations; beside the weights, {max(free_bytes, 0) / 2**30:,.1f} GiB are free"
        )


def plan_swap_space(config: EngineConfig, block: int, free_bytes: int, default: float = 0.0) -> int:
    """How many blocks of `block` bytes the host's swap space gets.

    If the configuration does not say: `default` GiB, or half of what is free where that is less. Only the paged memory policy
    has a use for any. Raises ConfigError if the configuration asks for more than is free.
    """
    if config.kv_policy != "paged":
        return 0
    if config.swap_space is None:
        return min(int(default * 2**30), free_bytes // 2) // block
    wanted = int(config.swap_space * 2**30)
    if wanted > free_bytes:
        raise ConfigError(f"swap_space asks for {wanted / 2**30:,.1f} GiB; {free_bytes / 2**30:,.1f} GiB are free")
    return wanted // block


def _num_blocks(config: EngineConfig, block: int, max_model_len: int, room: int, share: int) -> int:
    """The KV cache's blocks, out of `room` bytes in all, or `share` bytes where the configuration does not say."""
    blocks_per_sequence = -(-max_model_len // config.block_size)
    if config.num_gpu_blocks_override is not None:
        num_blocks, source = config.num_gpu_blocks_override, "num_gpu_blocks_override"
        blocks_per_sequence = 1  # whatever it is
    elif config.kv_cache_memory_bytes is not None:
        num_blocks, source = config.kv_cache_memory_bytes // block, "kv_cache_memory_bytes"
    else:
        num_blocks = min(share // block, config.max_num_seqs * blocks_per_sequence)
        source = "gpu_memory_utilization"
    if num_blocks * block > room:
        raise ConfigError(
            f"{source} asks for a KV cache of {num_blocks * block / 2**30:,.1f} GiB; "
            f"beside the model, {room / 2**30:,.1f} GiB are free"
        )
    if num_blocks < blocks_per_sequence:
        raise ConfigError(
            f"{source} leaves the KV cache {num_blocks} blocks of {config.block_size} tokens ({block:,} bytes each), "
            f"and one sequence of max_model_len = {max_model_len} tokens needs {blocks_per_sequence}: "
            "lower max_model_len or give more memory"
        )
    return num_blocks


@dataclass(frozen=True)
class _CgroupVersion:
    """Files in which Linux's control groups say how much memory a container may take and has, by their version."""

    limit: str
    usage: str
    stat: str
    reclaimable: tuple[str, str]  # lines of `stat`


_CGROUP_VERSIONS = (
    _CgroupVersion("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    _CgroupVersion(
        "memory/memory.limit_in_bytes",  # a number of 19 digits where there is no limit
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)


def free_host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still take: what the machine has to spare, within the container's limit."""
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        raise ConfigError(f"{proc / 'meminfo'} does not say MemAvailable: set kv_cache_memory_bytes")
    for version in _CGROUP_VERSIONS:
        limit = cgroup / version.limit
        if limit.exists() and (text := limit.read_text(encoding="ascii").strip()) != "max":
            # The container's page cache counts as used but is given back on demand.
            reclaimable = sum(
                int(line.split()[1])
                for line in (cgroup / version.stat).read_text(encoding="ascii").splitlines()
                if line.split()[0] in version.reclaimable
            )
            used = int((cgroup / version.usage).read_text(encoding="ascii")) - reclaimable
            available = min(available, int(text) - used)
    return max(available, 0)
