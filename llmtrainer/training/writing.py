"""A model writes: prompts become completions, shown as they grow where a person looks on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmtrainer.core.example import Message
from llmtrainer.core.protocols import Tokenizer, opening
from llmtrainer.generation.loop import Chosen, Completion, Finish, completion, generate, text_stream
from llmtrainer.generation.sampling import Sampling
from llmtrainer.generation.stopping import Growing
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.training.console import bar
from llmtrainer.training.models import Opened


@dataclass(frozen=True)
class Completed:
    """What followed a prompt."""

    prompt: str
    text: str
    """Without the prompt, without the names of control tokens, and cut before a stop string."""
    ids: tuple[int, ...]
    """As they were drawn, the end token included."""
    finish: Finish
    """Whether the model ended its text (`end`), a stop id or string did (`stop`), or its room (`length`)."""
    logprobs: dict[str, Any] | None = None
    """For each id: `model`, nats under the model's own distribution; `sampled`, under the one it was drawn from;
    `top`, the likeliest ids as [{id, piece, logprob}]."""

    def json(self) -> dict[str, Any]:
        """prompt, text, tokens (how many), finish, ids; logprobs if they were asked for."""
        told = {"prompt": self.prompt, "text": self.text, "tokens": len(self.ids), "finish": self.finish}
        told |= {"ids": list(self.ids)}
        return told if self.logprobs is None else {**told, "logprobs": self.logprobs}


def write(
    opened: Opened,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: int = 0,
    rows_at_once: int = 16,
    stream: bool = False,
    chat: Chat | None = None,
    system: str | None = None,
) -> list[Completed]:
    """Continue each prompt `samples` times; completions of one prompt stand together. `rows_at_once` are written
    side by side, which changes no text. `stream`: the only one goes to stdout as it grows. With `chat` a prompt is
    what a user says, behind a `system` text if there is one, and the answer stops where the template ends answers."""
    texts = [prompt for prompt in prompts for _ in range(samples)]
    assert not stream or len(texts) == 1
    tokenizer = opened.tokenizer
    sampling = _with_control_ids(sampling, tokenizer)
    if chat is None:
        read = [opening(tokenizer) + ids for ids in tokenizer.encode_batch(prompts)]
    else:
        first = [] if system is None else [Message("system", system)]
        read = [chat.prompt([*first, Message("user", prompt)]) for prompt in prompts]
        sampling = sampling.model_copy(update={"stop_ids": (*sampling.stop_ids, *chat.end_ids)})
    before = [ids for ids in read for _ in range(samples)]
    rows: list[list[Chosen]] = [[] for _ in texts]
    shown = prompts[0] if chat is None else ""
    screen = _Screen(text_stream(sampling, tokenizer, before[0]), shown) if stream else None
    # As long as one cache lives, the others share its copy of the weights.
    kept = opened.policy.cache(1, 1)
    most = sum(min(sampling.max_new_tokens, max(opened.policy.context_length - len(ids), 0)) for ids in before)
    with bar("generate", None if stream else most, "tokens") as advance:
        for start in range(0, len(texts), rows_at_once):
            batch = before[start : start + rows_at_once]
            for chosen in generate(opened.policy, batch, sampling, tokenizer, seed=seed, first_row=start):
                rows[start + chosen.row].append(chosen)
                if screen is not None:
                    screen.show(chosen.token)
                else:
                    advance(1)
    del kept
    if screen is not None:
        screen.close()
    return [
        _completed(tokenizer, sampling, text, ids, _ended(completion(row), () if chat is None else chat.end_ids))
        for text, ids, row in zip(texts, before, rows, strict=True)
    ]


def _ended(written: Completion, ends: Sequence[int]) -> Completion:
    """The end that a template puts behind an answer is the model's own, and no stop that somebody asked for."""
    ended = written.finish == "stop" and written.tokens[-1] in ends
    return replace(written, finish="end") if ended else written


def _with_control_ids(sampling: Sampling, tokenizer: Tokenizer) -> Sampling:
    """A stop string that names a control token means that token: its name is never part of a text."""
    named = [tokenizer.control[text] for text in sampling.stop if text in tokenizer.control]
    plain = tuple(text for text in sampling.stop if text not in tokenizer.control)
    return sampling.model_copy(update={"stop": plain, "stop_ids": (*sampling.stop_ids, *named)})


def _completed(
    tokenizer: FileTokenizer, sampling: Sampling, prompt: str, before: Sequence[int], written: Completion
) -> Completed:
    if sampling.stop:
        growing = text_stream(sampling, tokenizer, before)
        text = "".join(growing.feed(token) for token in written.tokens) + growing.close()
    else:
        last = written.tokens[-1]
        shown = written.tokens[:-1] if last in sampling.stop_ids else written.tokens
        text = text_after(tokenizer, before, shown)
    return Completed(prompt, text, written.tokens, written.finish, _logprobs(tokenizer, written))


def _logprobs(tokenizer: Tokenizer, written: Completion) -> dict[str, Any] | None:
    told = written.logprobs
    if told is None:
        return None
    return {
        "model": [one.model for one in told],
        "sampled": [one.sampled for one in told],
        "top": [
            [{"id": token, "piece": _piece(tokenizer, token), "logprob": nats} for token, nats in one.top]
            for one in told
        ],
    }


def _piece(tokenizer: Tokenizer, token: int) -> str:
    # Rows of the head that only pad it have no text.
    return "".join(tokenizer.pieces([token])) if token < tokenizer.vocabulary else ""


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
    """Writes a prompt and what follows it to stdout, a character as soon as it is certain."""

    def __init__(self, text: Growing, prompt: str) -> None:
        self._text = text
        self._put(prompt)

    def show(self, token: int) -> None:
        self._put(self._text.feed(token))

    def close(self) -> None:
        self._put(self._text.close() + "\n")

    def _put(self, text: str) -> None:
        sys.stdout.write(visible(text))
        sys.stdout.flush()
