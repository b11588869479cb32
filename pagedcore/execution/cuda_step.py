"""One step on a GPU: its inputs at fixed addresses, the forward pass and the draw, captured in graphs where they recur."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pagedcore import ops
from pagedcore.engine.step_plan import NUM_SAMPLING_COLUMNS, Header, StepLayout
from pagedcore.execution.kv_cache import KVCache
from pagedcore.layers.activations import ActivationBuffers
from pagedcore.layers.attention import AttentionInputs
from pagedcore.models.causal_lm import CausalLM


class CudaInputs:
    """Where the kernels find a step's inputs, at the same addresses for all steps of equal shape.

    `packed` is the buffer as it came from the host; `unpack` spreads what does not lie at a fixed place in it. The tokens
    that a step draws stay here, for the next step to take its input ids from.
    """

    def __init__(self, size: int, max_tokens: int, max_rows: int, table_width: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.packed = zeros(size)
        self.token_ids = zeros(max_tokens)
        self.block_tables = zeros(max_rows, table_width)
        self.sampling = zeros(max_rows, NUM_SAMPLING_COLUMNS)
        self.last_token_ids = zeros(max_rows)

    @property
    def num_bytes(self) -> int:
        tensors = (self.packed, self.token_ids, self.block_tables, self.sampling, self.last_token_ids)
        return sum(tensor.nbytes for tensor in tensors)

    def upload(self, buffer: torch.Tensor) -> None:
        """Enqueue the one copy of a step's packed buffer (int32, pinned), which must stay as it is until the step is done."""
        self.packed[: len(buffer)].copy_(buffer, non_blocking=True)

    def unpack(self, num_tokens: int, num_rows: int) -> None:
        ops.unpack_step(
            self.packed, self.last_token_ids, self.token_ids, self.block_tables, self.sampling, num_tokens, num_rows
        )

    def attention(
        self, num_tokens: int, num_rows: int, max_query_len: int, workspace: torch.Tensor
    ) -> tuple[AttentionInputs, torch.Tensor]:
        """What attention reads, and the index of each row's last token + 1, [num_rows] int32."""
        layout = StepLayout(
            num_tokens, num_rows, 0
        )  # these sections lie before the tables: their width does not matter
        query_start_loc = self.packed[layout.query_start_loc : layout.seq_lens]
        inputs = AttentionInputs(
            positions=self.packed[layout.positions : layout.slot_mapping],
            slot_mapping=self.packed[layout.slot_mapping : layout.query_start_loc],
            query_start_loc=query_start_loc,
            seq_lens=self.packed[layout.seq_lens : layout.seq_lens + num_rows],
            block_tables=self.block_tables[:num_rows],
            max_query_len=max_query_len,
            workspace=workspace,
        )
        return inputs, query_start_loc[1:]


@dataclass(frozen=True)
class CapturedStep:
    """`executable`: the graph's cudaGraphExec_t."""

    graph: torch.cuda.CUDAGraph
    executable: int


class CudaStep:
    """Runs steps on the current stream. Enqueues only: it never waits for the device."""

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCache,
        buffers: ActivationBuffers,
        inputs: CudaInputs,
        workspace: torch.Tensor,
    ) -> None:
        """workspace: uint8, zeros, as `ops.paged_attention` wants it."""
        self.inputs = inputs
        self.logits = buffers.logits
        self._model = model
        self._kv_cache = kv_cache
        self._buffers = buffers
        self._workspace = workspace
        self._captured: dict[tuple[int, int, bool], CapturedStep] = {}  # by tokens, rows, is_decode

    def captured(self, header: Header) -> CapturedStep | None:
        """What was captured for steps of this size, if they were."""
        return self._captured.get((header.num_tokens, header.num_rows, _may_overwrite_hidden(header)))

    def run(self, header: Header) -> None:
        """Compute the uploaded step: logits of each row's last token, and `inputs.last_token_ids`."""
        self._kv_cache.prepare(self.inputs.packed, header)
        captured = self.captured(header)
        if captured is not None:
            captured.graph.replay()
        else:
            self.forward(header.num_tokens, header.num_rows, header.max_query_len, _may_overwrite_hidden(header))

    def logits_at(self, indices: torch.Tensor) -> torch.Tensor:
        """The logits of these tokens of the step that `run` computed last, which has prompt targets: [num, vocab_size] float32.

        indices: [num] int32, at most as many as a step may have rows. The result is where the step's own logits were.
        """
        self._buffers.gather_last(indices)
        rows = self._buffers.for_rows(len(indices))
        self._model.head(rows)
        return rows.logits

    def capture(self, num_tokens: int, num_rows: int, is_decode: bool, pool: Any) -> None:
        """Capture steps of this size on the current stream; one of as many tokens must have run before.

        Where it is not of decode steps, the graph serves rows of any lengths, also of none. Graphs of one `pool`, which never
        run at the same time, share their memory.
        """
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        self.forward(num_tokens, num_rows, 1 if is_decode else num_tokens, is_decode)
        graph.capture_end()
        self._captured[num_tokens, num_rows, is_decode] = CapturedStep(graph, graph.raw_cuda_graph_exec())

    def forward(self, num_tokens: int, num_rows: int, max_query_len: int, is_decode: bool) -> None:
        """From the packed buffer to the drawn tokens. The arguments alone decide what is launched, and on which addresses."""
        inputs, buffers = self.inputs, self._buffers
        inputs.unpack(num_tokens, num_rows)
        attention, ends = inputs.attention(num_tokens, num_rows, max_query_len, self._workspace)
        self._model.embed(inputs.token_ids[:num_tokens], attention.positions, buffers)
        self._model(attention, self._kv_cache.layers, buffers.for_tokens(num_tokens))
        if is_decode:
            last = buffers.for_decode(num_rows)
        else:
            buffers.gather_last(ends - 1)
            last = buffers.for_rows(num_rows)
        self._model.head(last)
        ops.sample(last.logits, inputs.sampling[:num_rows], inputs.last_token_ids[:num_rows])


def _may_overwrite_hidden(header: Header) -> bool:
    """Whether a step may run as one of rows of one token each, whose head works where the layers left their results.

    Where something is still to be read there, it runs as a step of rows of any lengths, which is the same but for a copy.
    """
    return header.is_decode and header.num_prompt_targets == 0
