"""transformers as the judge: greedy continuations of a prompt, one token after another, with any change of the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Change = Callable[[torch.Tensor, list[int]], None]  # of the next token's logits [vocab_size], in place; tokens so far


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt."""

    prompt_ids: list[int]
    token_ids: list[int]
    pieces: list[str]  # the text of each token
    logprobs: list[list[float]]  # [len(token_ids)][vocab_size]: of the model's own distribution, before each token

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Judge:
    """A model in float32 and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def continuation(self, prompt: str | list[int], num_tokens: int, change: Change | None = None) -> Continuation:
        """The greedy one."""
        prompt_ids: list[int] = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        output: list[int] = []
        logprobs = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # several spin, and the server has the same cores
        with torch.inference_mode():
            for _ in range(num_tokens):
                logits = self._model(torch.tensor([prompt_ids + output])).logits[0, -1].float()
                logprobs.append(torch.log_softmax(logits, dim=-1).tolist())
                if change is not None:
                    change(logits, output)
                output.append(int(logits.argmax()))
        torch.set_num_threads(threads)
        return Continuation(prompt_ids, output, [self.tokenizer.decode([i]) for i in output], logprobs)

    def prompt_logprobs(self, prompt: str) -> Continuation:
        """The prompt itself behind its first token: what was expected at each of its tokens."""
        prompt_ids: list[int] = self.tokenizer(prompt).input_ids
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.inference_mode():
            rows = self._model(torch.tensor([prompt_ids])).logits[0, :-1].float().log_softmax(-1).tolist()
        torch.set_num_threads(threads)
        pieces = [self.tokenizer.decode([i]) for i in prompt_ids[1:]]
        return Continuation(prompt_ids[:1], prompt_ids[1:], pieces, rows)

    def beams(self, prompt: str, beam_width: int, num_outputs: int, num_tokens: int) -> list[str]:
        """The texts that beam search finds, best first."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        settings = {"num_beams": beam_width, "num_return_sequences": num_outputs, "do_sample": False}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        found = self._model.generate(**inputs, **settings, max_new_tokens=num_tokens)
        torch.set_num_threads(threads)
        texts: list[str] = self.tokenizer.batch_decode(found[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return texts
