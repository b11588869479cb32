"""The offline interface: a list of prompts in, their continuations out, with vLLM's names."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from tqdm import tqdm

from pagedcore.build import load_engine
from pagedcore.config import EngineConfig
from pagedcore.engine.logprobs import TokenLogprobs
from pagedcore.engine.outputs import EngineStats, TokenOutput
from pagedcore.engine.request import Request, truncate_prompt
from pagedcore.engine.sampling_params import SamplingParams
from pagedcore.engine.sequence import FinishReason
from pagedcore.errors import ConfigError, RequestError
from pagedcore.output_text import OutputText, prompt_end
from pagedcore.text import Tokenizer


class TokensPrompt(TypedDict):
    """A prompt that is token ids already."""

    prompt_token_ids: list[int]


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


PromptType = str | TokensPrompt | TextPrompt


@dataclass(frozen=True)
class Logprob:
    """Log probability of one token; `rank` is 1 for the most likely one."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One continuation of a prompt.

    `logprobs` holds one mapping from token id to Logprob per output token, when the sampling parameters ask for them;
    `cumulative_logprob` is then the sum over the chosen tokens, as it is where outputs are ranked (best_of, beam search).
    `stop_reason` is the stop string or stop token id.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """A prompt and its continuations.

    `prompt_logprobs`, when the sampling parameters ask for them: None for the first token, and for every other one a mapping
    as in `CompletionOutput.logprobs`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class LLM:
    """An engine for offline use. `arguments` are EngineConfig's, with vLLM's names; raises ConfigError for a bad one."""

    def __init__(self, model: str, **arguments: Any) -> None:
        self._config = EngineConfig.from_dict({"model": model, **arguments})
        self._loaded = load_engine(self._config)
        self._num_requests = 0

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt; the results are in the order of the prompts.

        `sampling_params`: one for all prompts, or one for each. Raises RequestError, before anything runs, if a prompt or its
        parameters cannot be served.
        """
        if isinstance(prompts, (str, Mapping)):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise RequestError(f"prompts must be one or a list of them, got {type(prompts).__name__}")
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, Sequence) or not all(isinstance(p, SamplingParams) for p in sampling_params):
            raise RequestError(f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r:.64}")
        if len(sampling_params) != len(prompts):
            raise RequestError(
                f"sampling_params must be one, or one per prompt: got {len(sampling_params)} for {len(prompts)}"
            )
        generations = [self._start(prompt, params) for prompt, params in zip(prompts, sampling_params, strict=True)]
        for generation in generations:
            self._loaded.engine.check(generation.request)
        self._run(generations, use_tqdm)
        return [generation.result for generation in generations]

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises ConfigError when it was not loaded (`skip_tokenizer_init`)."""
        if self._loaded.tokenizer is None:
            raise ConfigError("the tokenizer was not loaded: skip_tokenizer_init is true")
        return self._loaded.tokenizer

    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._loaded.engine.stats()

    def shutdown(self) -> None:
        """Release the engine's threads and memory; the object is of no use afterwards."""
        self._loaded.engine.shutdown()

    def _start(self, prompt: PromptType, params: SamplingParams) -> _Generation:
        text, token_ids = _check_prompt(prompt)
        if token_ids is None:
            token_ids = self.get_tokenizer().encode(text or "")
        token_ids = truncate_prompt(token_ids, params, self._loaded.max_model_len)
        bad_words = self.get_tokenizer().bad_word_ids(params.bad_words) if params.bad_words else ()
        request = Request(str(self._num_requests), token_ids, params, bad_words=bad_words)
        self._num_requests += 1
        return _Generation(request, text, self._loaded.tokenizer)

    def _run(self, generations: list[_Generation], use_tqdm: bool) -> None:
        engine = self._loaded.engine
        unfinished = {generation.request.request_id: generation for generation in generations}
        try:
            for generation in generations:
                engine.add_request(generation.request)
            with tqdm(
                total=len(generations), desc="Processed prompts", disable=not use_tqdm, unit="prompt"
            ) as progress:
                while unfinished or engine.has_work():
                    for output in engine.step():
                        generation = unfinished[output.request_id]
                        if generation.take(output):  # a stop string, which only the text shows
                            for end in engine.end_sequence(output.request_id, output.index):
                                generation.note_end(end)
                        if generation.result.finished:
                            del unfinished[output.request_id]
                            progress.update()
        finally:
            for request_id in unfinished:
                engine.abort(request_id)


def _check_prompt(prompt: object) -> tuple[str | None, list[int] | None]:
    """The text or the token ids of a prompt; raises RequestError for what is none."""
    text = prompt["prompt"] if isinstance(prompt, Mapping) and list(prompt) == ["prompt"] else prompt
    if isinstance(text, str):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError("a prompt must be valid Unicode text, got a lone surrogate")
        return text, None
    if isinstance(prompt, Mapping) and list(prompt) == ["prompt_token_ids"]:
        token_ids = prompt["prompt_token_ids"]
        if isinstance(token_ids, Iterable) and not isinstance(token_ids, (str, bytes, Mapping)):
            token_ids = list(token_ids)
            if all(isinstance(token_id, numbers.Integral) for token_id in token_ids):
                return None, [int(token_id) for token_id in token_ids]
    raise RequestError(
        'a prompt must be a text, {"prompt": a text} or {"prompt_token_ids": a list of integers}, '
        f"got {prompt!a:.64}"
    )


class _Generation:
    """Collects one request's outputs into its RequestOutput."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer | None) -> None:
        self.request = request
        params = request.sampling_params
        tokenizer = tokenizer if params.detokenize else None
        if params.stop and tokenizer is None:
            raise RequestError("stop strings need a tokenizer and detokenize = true")
        self._tokenizer = tokenizer
        self._completions = [_Completion(request, tokenizer, index) for index in range(params.n)]
        outputs = [completion.output for completion in self._completions]
        self.result = RequestOutput(request.request_id, prompt, request.prompt_token_ids, outputs)

    def take(self, output: TokenOutput) -> bool:
        """Add an output; returns whether a stop string has just ended its sequence. Raises the error that ended the request."""
        if output.error is not None:
            raise output.error
        if output.prompt_logprobs is not None:
            positions = output.prompt_logprobs.positions()
            token_ids = self.request.prompt_token_ids[1:]
            self.result.prompt_logprobs = [None, *_logprob_maps(token_ids, positions, self._tokenizer)]
        stopped = self._completions[output.index].take(output)
        if output.finish_reason is not None:
            self.note_end(output)
        self.result.finished = all(completion.output.finish_reason is not None for completion in self._completions)
        return stopped

    def note_end(self, output: TokenOutput) -> None:
        """Take over what only the last output of a sequence says of the request."""
        self.result.num_cached_tokens = output.num_cached_tokens


class _Completion:
    """Collects the outputs of one sequence into its CompletionOutput."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, index: int) -> None:
        params = request.sampling_params
        self.output = CompletionOutput(index)
        self._tokenizer = tokenizer
        self._hides_stop_token = not params.include_stop_str_in_output
        self._text: OutputText | None = None
        if tokenizer is not None:
            self._text = OutputText(
                tokenizer,
                prompt_end(tokenizer, request.prompt_token_ids, params.skip_special_tokens),
                stop=params.stop or (),
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
            )

    def take(self, output: TokenOutput) -> bool:
        """Add an output; returns whether a stop string, not the engine, has just ended the sequence."""
        completion, reason = self.output, output.finish_reason
        if completion.finish_reason is not None:
            return False  # the engine was a step ahead of the stop string
        completion.token_ids += output.token_ids
        if output.logprobs is not None:
            self._add_logprobs(output.token_ids, output.logprobs)
        stopped_by = None
        if self._text is not None:
            hide_last = reason is FinishReason.STOP and self._hides_stop_token
            completion.text += self._text.push(output.token_ids, final=reason is not None, hide_last=hide_last)
            stopped_by = self._text.stopped_by
        if output.cumulative_logprob is not None:
            completion.cumulative_logprob = output.cumulative_logprob
        if stopped_by is not None:
            completion.finish_reason, completion.stop_reason = FinishReason.STOP.value, stopped_by
        elif reason is not None:
            completion.finish_reason, completion.stop_reason = reason.value, output.stop_reason
        return stopped_by is not None and reason is None

    def _add_logprobs(self, token_ids: Iterable[int], logprobs: Iterable[TokenLogprobs]) -> None:
        completion = self.output
        if completion.logprobs is None:
            completion.logprobs, completion.cumulative_logprob = [], 0.0
        entries = list(logprobs)
        completion.cumulative_logprob = sum((entry.logprob for entry in entries), completion.cumulative_logprob or 0.0)
        completion.logprobs += _logprob_maps(token_ids, entries, self._tokenizer)


def _logprob_maps(
    token_ids: Iterable[int], entries: Iterable[TokenLogprobs], tokenizer: Tokenizer | None
) -> Iterator[dict[int, Logprob]]:
    """For each position the token that is there, then the most likely ones."""

    def text(token_id: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(token_id)

    for token_id, entry in zip(token_ids, entries, strict=True):
        position = {token_id: Logprob(entry.logprob, entry.rank, text(token_id))}
        for rank, (other, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs, strict=True), 1):
            if other >= 0:
                position.setdefault(other, Logprob(logprob, rank, text(other)))
        yield position
