"""Prompts to answer, with whatever their records hold besides: which of them each step asks, by (seed, step) alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Message
from llmtrainer.core.rollout import Prompt
from llmtrainer.data.detect import short
from llmtrainer.data.draws import Draws
from llmtrainer.data.fates import Run, Totals, joined, totals
from llmtrainer.data.format import (
    BESIDE,
    are_turns,
    items,
    mapping,
    needed,
    opened,
    optional_text,
    others,
    refused,
    require_plain,
    text,
    tools,
    turns,
)
from llmtrainer.data.plan import Part, is_held_out
from llmtrainer.data.records import Record

KEYS = ("prompt", "messages", "conversations", "question", "problem", "query", "instruction")
"""Where a record's prompt is, unless it is said: the first of these keys that it has."""
TooLong = Literal["drop", "keep_end", "keep_start"]


class PromptMaker(Protocol):
    """Prompts to ids: a chat template with its tokenizer."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The conversation, and the template's call for an answer."""
        ...

    def plain_prompt(self, text: str) -> list[int]:
        """A text as a base model reads it before it goes on."""
        ...


@dataclass(frozen=True)
class PromptChoices:
    """How records are read as prompts."""

    key: str | None = None
    """Where the prompt is; None: the first of KEYS. `a+b`: both texts, with a newline between."""
    as_messages: bool = False
    """Whether a text is a user's message, and not read as it stands."""
    system: str | None = None
    """What the system says where the record does not say it; texts are then messages."""
    longest: int = 1024
    """Tokens of the longest prompt."""
    too_long: TooLong = "drop"
    """What becomes of a longer one: dropped, or cut to its last or its first tokens."""


@dataclass(frozen=True)
class Asked:
    """What a record asks, before it is tokens."""

    messages: tuple[Message, ...]
    plain: bool
    """Text as it stands, without a template."""
    ids: tuple[int, ...] | None
    """The prompt where another program has tokenised it."""
    facts: Mapping[str, Any]
    tools: tuple[Mapping[str, Any], ...] = ()


def asked(value: object, choices: PromptChoices) -> Asked:
    """The prompt of a record: a text, messages (of which answers at the end are left out), or ids. What else it holds
    are facts; the text of an answer that was left out is the fact `answer`, unless it has one. UserError names the key
    that is missing or wrong."""
    if isinstance(value, str):
        value = {"prompt": value}
    if isinstance(value, list) and are_turns(value):
        value = {"messages": value}
    record = mapping(value)
    key = choices.key or next((name for name in KEYS if name in record), KEYS[0])
    parts = [key] if key in record else key.split("+")
    facts = others(record, *parts, *BESIDE)
    found = [needed(record, part) for part in parts]
    if len(found) > 1 or isinstance(found[0], str):
        told = "\n".join(text(item, part) for item, part in zip(found, parts, strict=True))
        if parts == ["instruction"] and optional_text(record, "input"):
            told, facts = f"{told}\n\n{record['input']}", others(facts, "input")
        if not told.strip():
            refused("a prompt says nothing", key)
        return _of_text(told, record, choices, facts)
    given = found[0]
    if isinstance(given, list) and given and all(type(item) is int for item in given):
        require_plain(record, "a list of token ids")
        return Asked((), True, tuple(given), facts)
    if not isinstance(given, Mapping):
        items(given, key)
    messages = turns(given, key)
    last = len(messages)
    while last and messages[last - 1].role == "assistant":
        last -= 1
    if last == 0:
        refused("a prompt has no message to answer", key, "every message in it is an assistant's")
    if last < len(messages):
        facts = {"answer": messages[-1].content, **facts}
    return Asked(_with_system(messages[:last], record, choices), False, None, facts, tools(record))


def _of_text(told: str, record: Mapping[str, Any], choices: PromptChoices, facts: Mapping[str, Any]) -> Asked:
    message = (Message("user", told),)
    if choices.as_messages or choices.system is not None or any(record.get(key) for key in BESIDE):
        return Asked(_with_system(message, record, choices), False, None, facts, tools(record))
    return Asked(message, True, None, facts)


def _with_system(
    messages: tuple[Message, ...], record: Mapping[str, Any], choices: PromptChoices
) -> tuple[Message, ...]:
    messages = opened(messages, record)
    if choices.system is None or messages[0].role == "system":
        return messages
    return (Message("system", choices.system), *messages)


@dataclass(frozen=True)
class PromptTable:
    """The prompts of some files in order, and what became of every record."""

    prompts: tuple[Prompt, ...]
    told: Totals
    how: str
    """For people: the first of them, and where it stands."""


def read_prompts(
    found: Iterable[Record], maker: PromptMaker, choices: PromptChoices, *, bad_may_drop: bool = False,
    report: Callable[[int], None] | None = None,
) -> PromptTable:  # fmt: skip
    """Every record becomes a prompt or has a reason. UserError, with its file and line, for one that cannot be read,
    unless `bad_may_drop`."""
    prompts: list[Prompt] = []
    runs, how = [], ""
    source, name = -1, None
    for record in found:
        if record.file != name:
            source, name = source + 1, record.file
        try:
            prompt, fate, why = _fate(record, maker, choices)
        except UserError as error:
            if not bad_may_drop:
                error.where = record.place if error.where is None else f"{record.place}, {error.where}"
                raise
            prompt, fate, why = None, "bad record", error.what
        if prompt is not None:
            how = how or f"{record.place}, is asked as:\n{shown(prompt)}"
            prompts.append(prompt)
        place = None if fate == "kept" else record.place
        runs.append(Run(source, record.number, record.number, fate, int(prompt is not None), place, why).plain())
        if report is not None:
            report(1)
    return PromptTable(tuple(prompts), totals(joined(runs)), how)


def _fate(record: Record, maker: PromptMaker, choices: PromptChoices) -> tuple[Prompt | None, str, str | None]:
    item = asked(record.value, choices)
    if item.ids is not None:
        tokens = list(item.ids)
    elif item.plain:
        tokens = maker.plain_prompt(item.messages[0].content)
    else:
        tokens = maker.prompt(item.messages, item.tools)
    fate, length = "kept", len(tokens)
    if length == 0:
        return None, "empty", "the prompt has no token, and nothing could begin an answer"
    if length > choices.longest:
        if choices.too_long == "drop":
            return None, "too long", f"{length:,} tokens"
        fate = "cut"
        tokens = tokens[-choices.longest :] if choices.too_long == "keep_end" else tokens[: choices.longest]
    prompt = Prompt(item.messages, tuple(tokens), item.facts, item.plain)
    return prompt, fate, None if fate == "kept" else f"{length:,} tokens"


def shown(prompt: Prompt) -> str:
    """A prompt for people, a line a message, long texts shortened."""
    lines = ["  without a template, as it stands"] if prompt.plain else []
    lines += [f"  {message.role}: {short(message.content)}" for message in prompt.messages]
    lines += [f"  {len(prompt.tokens):,} tokens; facts: {', '.join(prompt.facts) or 'none'}"]
    return "\n".join(lines)


class Prompts:
    """Prompts by draw, as a function of (seed, step).

    Step n asks draws n*R .. (n+1)*R - 1, R = `prompts_per_step`; draw d is prompt `order(d mod P)` of epoch d div P, P
    the prompts of this part, in an order of that epoch alone. So to resume at step n is to ask for step n.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, prompts_per_step: int, seed: int, held_out: float = 0.0,
        part: Part = "train", shuffle: bool = True,
    ) -> None:  # fmt: skip
        """`held_out` is the share kept from training, chosen by a hash of the prompt's number. UserError where this
        part has none."""
        kept = is_held_out(np.arange(len(prompts)), held_out) == (part == "held_out")
        self._prompts = [prompt for prompt, mine in zip(prompts, kept.tolist(), strict=True) if mine]
        if not self._prompts:
            raise UserError(
                f"there is no prompt to answer (part `{part}`)", why=f"{len(prompts):,} prompts in all",
                fix="more prompts, or another data.held_out",
            )
        self.prompts_per_step = prompts_per_step
        facts = [_digest(prompts), prompts_per_step, seed, held_out, part, shuffle]
        self.fingerprint: str = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        """SHA-256 of the prompts, their facts, and every setting that decides which of them a step asks."""
        self._draws = Draws(len(self._prompts), prompts_per_step, seed, shuffle)

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self._prompts)

    def draws(self, step: int) -> range:
        """The draws of a step, over all ranks."""
        return range(step * self.prompts_per_step, (step + 1) * self.prompts_per_step)

    def number(self, draw: int) -> int:
        """Which prompt of this part a draw asks."""
        step, place = divmod(draw, self.prompts_per_step)
        return self._draws.of_step(step)[place][1]

    def prompt(self, draw: int) -> Prompt:
        return self._prompts[self.number(draw)]

    @property
    def steps_per_epoch(self) -> float:
        return self._draws.steps_per_epoch

    def epochs(self, step: int) -> float:
        """Passes over the prompts after so many steps."""
        return self._draws.epochs(step)


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(asdict(prompt), sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
