"""The policy as somebody who answers: with the very code that reads, and the weights as they are now."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from llmtrainer.generation.loop import Completion, complete, text_stream
from llmtrainer.generation.sampling import Sampling
from llmtrainer.models.stored import Policy
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.training.reference import at_rest
from llmtrainer.training.writing import text_after


class PolicyWriter:
    """Answers by the policy that is trained, whose weights it shares."""

    def __init__(self, policy: Policy, tokenizer: FileTokenizer, sampling: Sampling, rows_at_once: int) -> None:
        self._policy, self._tokenizer, self._rows_at_once = policy, tokenizer, rows_at_once
        self._sampling = sampling.model_copy(update={"logprobs": 0})

    def write(self, prompts: Sequence[Sequence[int]], seed: int) -> list[Completion]:
        """One answer to each prompt, with its log-probabilities."""
        with at_rest(self._policy):
            return complete(
                self._policy, prompts, self._sampling, self._tokenizer, seed=seed, rows_at_once=self._rows_at_once
            )

    def version(self) -> str:
        """SHA-256 over every weight that is trained."""
        digest = hashlib.sha256()
        for name, value in self._policy.named_parameters():
            if value.requires_grad:
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def text(self, prompt: Sequence[int], answer: Completion) -> str:
        """What was written, without control tokens and without the stop string that ended it."""
        if self._sampling.stop:
            growing = text_stream(self._sampling, self._tokenizer, prompt)
            return "".join(growing.feed(token) for token in answer.tokens) + growing.close()
        ended = answer.tokens and answer.tokens[-1] in self._sampling.stop_ids
        return text_after(self._tokenizer, prompt, answer.tokens[:-1] if ended else answer.tokens)
