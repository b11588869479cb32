"""The model that Triton's Python backend loads: requests in, a stream of responses out."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from pagedcore.config import EngineConfig, read_engine_arguments
from pagedcore.engine.deadlines import Deadline
from pagedcore.engine.queue_limits import RefusalReason
from pagedcore.engine.request import Request, truncate_prompt
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.telemetry import Recorder
from pagedcore.errors import ConfigError
from pagedcore.output_text import OutputText, PromptEnd, prompt_end
from pagedcore.serve.cache import SetupError
from pagedcore.serve.default_model import resolve_model
from pagedcore_triton.lifecycle import Lifecycle
from pagedcore_triton.metric_families import INTERNAL
from pagedcore_triton.metrics import Metrics, MetricsSource
from pagedcore_triton.model_config import ServingConfig
from pagedcore_triton.protocol import INPUTS, OUTPUTS, OutputDelta, OutputTensor, encode, num_bytes
from pagedcore_triton.requests import (
    GenerateRequest,
    check_response_size,
    encode_prompt,
    parse_request,
    parse_timeout,
)
from pagedcore_triton.responses import ErrorCode, ResponseStream, error_of
from pagedcore_triton.senders import SenderPool
from pagedcore_triton.sequence_output import PromptOutput, SequenceOutput

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0  # for each part of finalize
LARGE_RESPONSE_BYTES = 64 << 10


class TritonChannel:
    """The way back to a request's client, through Triton's response sender; responses have the tensors of `outputs`."""

    def __init__(self, sender: Any, outputs: Sequence[OutputTensor]) -> None:
        self._sender = sender
        self._outputs = outputs

    def send(self, delta: OutputDelta, final: bool) -> None:
        arrays = encode(delta, self._outputs)
        tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items()]
        response = pb_utils.InferenceResponse(output_tensors=tensors)
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if not final:
            self._sender.send(response)
        elif sum(map(num_bytes, arrays.values())) < LARGE_RESPONSE_BYTES:
            self._sender.send(response, flags=flags)
        else:
            # Triton closes a sender before it looks for room in shared memory: a final response that finds none could not be
            # followed by an error. A client sees no difference, as an end without a response is none.
            self._sender.send(response)
            self._sender.send(flags=flags)

    def send_error(self, code: ErrorCode, message: str) -> None:
        error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code.value))
        response = pb_utils.InferenceResponse(output_tensors=[], error=error)
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class TritonPythonModel:
    """One engine, and the threads that carry its requests and responses."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Add the inputs and outputs that config.pbtxt leaves out. Runs in a process of its own, without the engine."""
        config = auto_complete_model_config.as_dict()
        given = {tensor["name"] for tensor in (*config["input"], *config["output"])}
        for tensor in INPUTS:
            if tensor.name not in given:
                auto_complete_model_config.add_input(tensor.config())
        for output in OUTPUTS:
            if output.name not in given:
                auto_complete_model_config.add_output(output.config())
        auto_complete_model_config.set_max_batch_size(0)
        auto_complete_model_config.set_model_transaction_policy({"decoupled": True})
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that model.json describes; raises TritonModelException if it cannot be."""
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        try:
            serving = ServingConfig.from_model_config(json.loads(args["model_config"]))
            config = _read_engine_config(Path(args["model_repository"], args["model_version"], "model.json"))
            config = serving.placed(config, args["model_instance_kind"], int(args["model_instance_device_id"]))
            from pagedcore.build import build_engine  # it loads torch, which a wrong configuration need not wait for

            recorder = Recorder() if serving.reports_metrics and not config.disable_log_stats else None
            self._loaded = build_engine(config, recorder)
        except (ConfigError, SetupError) as error:
            raise pb_utils.TritonModelException(str(error)) from error
        assert self._loaded.tokenizer is not None
        self._tokenizer = self._loaded.tokenizer
        self._engine = self._loaded.engine
        self._model_name = args["model_name"]
        self._request_ids = itertools.count()
        self._senders = SenderPool(self._engine)
        self._senders.start()
        self._lifecycle = Lifecycle(self._engine, self._senders.stop, serving.drain_seconds)
        self._lifecycle.start()
        self._metrics: Metrics | None = None
        if recorder is not None:
            labels = {"model": args["model_name"], "version": args["model_version"]}
            if serving.num_instances > 1:
                labels["instance"] = args["model_instance_name"]
            source = MetricsSource(self._engine.stats, recorder, self._loaded.max_model_len, labels)
            self._metrics = Metrics(source)
            self._metrics.start()

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to the engine and return; a request that cannot be served is answered here."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except Exception as error:
                code, message = error_of(error)
                if code is ErrorCode.INTERNAL:
                    logger.exception("a request failed before it reached the engine")
                self._count_refused(code)
                TritonChannel(sender, ()).send_error(code, message)

    def is_ready(self) -> bool:
        """Whether the engine takes requests and makes progress; Triton asks from its 2026 releases on."""
        return self._engine.is_healthy()

    def finalize(self) -> None:
        """Stop the threads; what is unfinished gets an error. Takes a bounded time."""
        self._lifecycle.stop(STOP_SECONDS)
        self._loaded.shutdown()
        self._senders.stop(STOP_SECONDS)
        if self._metrics is not None:
            self._metrics.stop(STOP_SECONDS)

    def _submit(self, request: Any, sender: Any) -> None:
        arrived_at = time.monotonic()
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        generate = parse_request(
            inputs,
            request.parameters(),
            request.requested_output_names(),
            model_name=self._model_name,
            request_id=request.request_id(),
        )
        self._engine.check_room()  # under overload, most requests need not be tokenized
        params = generate.sampling_params
        max_model_len = self._loaded.max_model_len
        limit = max_model_len - 1 if params.truncate_prompt_tokens is None else None
        prompt_token_ids = truncate_prompt(
            encode_prompt(self._tokenizer, generate.prompt, limit), params, max_model_len
        )
        check_response_size(generate, len(prompt_token_ids), max_model_len)
        timeout_us = request.timeout() or parse_timeout(request.parameters())
        deadline = Deadline(timeout_us / 1e6, arrived_at) if timeout_us > 0 else None
        engine_request = Request(
            str(next(self._request_ids)),
            prompt_token_ids,
            params,
            cache_salt=generate.cache_salt,
            bad_words=self._tokenizer.bad_word_ids(params.bad_words or ()),
            deadline=deadline,
            arrived_at=arrived_at,
        )
        self._engine.check(engine_request)  # what follows takes the longer, the longer the prompt
        stream = ResponseStream(
            engine_request.request_id,
            TritonChannel(sender, generate.outputs),
            self._sequence_outputs(generate, prompt_token_ids),
            stream=generate.stream,
            has_stop_strings=bool(params.stop),
            num_input_tokens=len(prompt_token_ids),
            prompt=self._prompt_output(generate, prompt_token_ids),
        )
        self._senders.add(stream)
        try:
            self._engine.submit(engine_request, stream)
        except Exception as error:
            if error_of(error)[0] is ErrorCode.INTERNAL:  # the engine counts what it refuses
                logger.exception("request %s failed on its way to the engine", stream.request_id)
                self._count_refused(ErrorCode.INTERNAL)
            # Through the stream: it knows that nobody may ask the channel anything once this has been sent.
            self._senders.discard(stream)
            stream.refuse(error)

    def _sequence_outputs(self, generate: GenerateRequest, prompt_token_ids: list[int]) -> list[SequenceOutput]:
        params, tokenizer = generate.sampling_params, self._tokenizer
        prefix = ""
        if generate.echo:
            is_text = isinstance(generate.prompt, str)
            prefix = str(generate.prompt) if is_text else tokenizer.decode(prompt_token_ids, skip_special_tokens=False)
        end = prompt_end(tokenizer, prompt_token_ids, params.skip_special_tokens)
        return [
            SequenceOutput(
                tokenizer,
                self._output_text(params, end) if params.detokenize else None,
                prefix=prefix,
                hides_stop_token=not params.include_stop_str_in_output,
                wants_logprobs=generate.wants_logprobs,
            )
            for _ in range(params.n)
        ]

    def _prompt_output(self, generate: GenerateRequest, prompt_token_ids: list[int]) -> PromptOutput | None:
        if not generate.wants_prompt_logprobs:
            return None
        return PromptOutput(prompt_token_ids, self._tokenizer if generate.sampling_params.detokenize else None)

    def _output_text(self, params: SamplingParams, prompt: PromptEnd) -> OutputText:
        return OutputText(
            self._tokenizer,
            prompt,
            stop=params.stop or (),
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
        )

    def _count_refused(self, code: ErrorCode) -> None:
        """Count what the engine has not seen, and so has not counted."""
        if self._metrics is not None and code is not ErrorCode.UNAVAILABLE:
            reason = RefusalReason.INVALID.value if code is ErrorCode.INVALID_ARG else INTERNAL
            self._metrics.count_refused(reason)


def _read_engine_config(path: Path) -> EngineConfig:
    config = EngineConfig.from_dict(read_engine_arguments(path))
    if config.skip_tokenizer_init:
        raise ConfigError("skip_tokenizer_init must be false: this server's input and output are text")
    resolve_model(config.model)
    return config
