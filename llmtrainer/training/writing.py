"""A model writes: prompts become completions, shown as they grow where a person looks on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmtrainer.core.protocols import Tokenizer, opening
from llmtrainer.generation.loop import generate
from llmtrainer.generation.sampling import Sampling
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.training.console import bar
from llmtrainer.training.models import Opened


@dataclass(frozen=True)
class Completed:
    """What followed a prompt."""

    prompt: str
    text: str
    """Without the prompt, and without the names of control tokens."""
    ids: tuple[int, ...]
    """As they were drawn, the end token included."""
    finish: Literal["end", "length"]
    """Whether the model ended its text, or its room did."""

    def json(self) -> dict[str, Any]:
        """prompt, text, tokens (how many), finish, ids."""
        told = {"prompt": self.prompt, "text": self.text, "tokens": len(self.ids), "finish": self.finish}
        return {**told, "ids": list(self.ids)}


def write(
    opened: Opened, prompt: str, sampling: Sampling, *, samples: int = 1, seed: int = 0, stream: bool = False
) -> list[Completed]:
    """Continue a prompt `samples` times, side by side. `stream`: the only one goes to stdout as it grows."""
    assert not stream or samples == 1
    tokenizer = opened.tokenizer
    before = opening(tokenizer) + tokenizer.encode(prompt)
    drawn: list[list[int]] = [[] for _ in range(samples)]
    steps = generate(opened.policy, [before] * samples, sampling, tokenizer, seed=seed)
    if stream:
        screen = _Screen(tokenizer, prompt, before)
        for _, token in steps:
            drawn[0].append(token)
            screen.show(token)
        screen.close()
    else:
        with bar("generate", samples * sampling.max_new_tokens, "tokens") as advance:
            for row, token in steps:
                drawn[row].append(token)
                advance(1)
    return [
        Completed(
            prompt, text_after(tokenizer, before, ids), tuple(ids),
            "end" if ids and ids[-1] == tokenizer.end else "length",
        )
        for ids in drawn
    ]


def text_after(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add to the text of `before`. A decoder may treat a token by what stands before it: some
    drop the blank in front of a text's first word, which a continuation must keep."""
    whole = tokenizer.decode([*before, *ids], skip_control=True)
    start = tokenizer.decode(before, skip_control=True)
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(ids, skip_control=True)


def visible(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters but newline and tab as \\x1b."""
    return "".join(
        letter if letter in "\n\t" or (letter >= " " and not "\x7f" <= letter < "\xa0") else f"\\x{ord(letter):02x}"
        for letter in text
    )


class _Screen:
    """Writes a prompt and what follows it to stdout, a character as soon as its last token is there."""

    def __init__(self, tokenizer: FileTokenizer, prompt: str, before: Sequence[int]) -> None:
        self._text = tokenizer.stream()
        self._silent = set(tokenizer.control.values())
        for token in before:    # what comes next may depend on it
            if token not in self._silent:
                self._text.feed(token)
        self._put(prompt)

    def show(self, token: int) -> None:
        if token not in self._silent:
            self._put(self._text.feed(token))

    def close(self) -> None:
        self._put(self._text.close() + "\n")

    def _put(self, text: str) -> None:
        sys.stdout.write(visible(text))
        sys.stdout.flush()
