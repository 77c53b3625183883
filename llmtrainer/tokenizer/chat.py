"""Conversations as tokens by any chat template, with proof of which tokens the model is to learn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, Message, TokenRow
from llmtrainer.tokenizer.marks import Marker, Names, Read, as_values, characters, fields_of
from llmtrainer.tokenizer.sandbox import Template
from llmtrainer.tokenizer.template import Chosen, choose
from llmtrainer.tokenizer.tokenizer import FileTokenizer

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Control:
    """A control token that the template wrote, in characters of the rendered text."""

    start: int
    stop: int
    token: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, of which is proved what the template wrote and what users did."""

    text: str
    read: Read
    controls: tuple[Control, ...]

    def of_message(self, place: int) -> list[int]:
        """Where marks of a message's texts stood, rising."""
        found = [where for (owner, _), where in self.read.places.items() if owner == place]
        return sorted(place for where in found for place in where)


class Chat:
    """Turns conversations into rows to train on and into prompts to answer, both by one rendering.

    What is proved for every conversation, or refused with a UserError: the text with marks in every user's text is,
    without them, the text byte for byte, so each piece's place is known; every text of a user is there and becomes
    ordinary ids, whatever it says; what is learned of an answer begins where the prompt for it ends and ends with
    the control token at which generation stops; it is what the model would be asked to write at that place.
    """

    def __init__(
        self, tokenizer: FileTokenizer, template: str = "auto", *, day: date | None = None,
        leave_out: Sequence[str] = (),
    ) -> None:
        """`template`: `auto` (the tokenizer's own), the name of a built-in one, or a path to a .jinja file. `day`:
        the date for templates with a clock. `leave_out`: `thinking` or `tools`, which the template may drop."""
        self.tokenizer = tokenizer
        self._chosen: Chosen = choose(tokenizer, template)
        self._day, self._leave_out = day, frozenset(leave_out)
        self._templates = {
            name: Template(text, f"{self._chosen.where}", day) for name, text in self._chosen.texts.items()
        }
        self._names = Names(list(tokenizer.control))
        self._template_letters = set("".join(self._chosen.texts.values()))
        self.end_ids: tuple[int, ...] = self._find_ends()
        """Ids at which an answer stops."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which ids a conversation becomes."""
        decides = {
            "templates": dict(self._chosen.texts), "tokenizer": self.tokenizer.fingerprint, "roles": dict(self._roles),
            "day": None if self._day is None else self._day.isoformat(), "leave_out": sorted(self._leave_out),
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def row(self, example: Example) -> TokenRow:
        """The conversation up to its last learned answer or further, with every answer learned that stands there as
        the model would write it.

        A template that rewrites what lies back (one that drops earlier reasoning) shows earlier answers otherwise;
        those are only read here, and `rows` has them too.
        """
        return self.rows(example)[-1]

    def rows(self, example: Example) -> tuple[TokenRow, ...]:
        """As few rows as it takes to learn every answer once, as the model would be asked to write it. One, unless
        the template rewrites what lies back; then the others are the conversation up to an earlier answer."""
        if example.plain:
            return (self._plain(example),)
        open_turns = [place for place, message in enumerate(example.messages) if _weight(message) > 0]
        rows: list[TokenRow] = []
        stop = len(example.messages)
        while True:
            rendered = self._render(example.messages[:stop], example.tools)
            learned = self._learned(example, stop, rendered, open_turns)
            if learned or not open_turns:
                rows.append(self._encode(example.messages[:stop], example.tools, rendered, learned))
            open_turns = [place for place in open_turns if place not in learned]
            if not open_turns:
                return tuple(reversed(rows))
            stop = open_turns[-1] + 1

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """What a model reads before it answers: the conversation and the template's call for an answer."""
        rendered = self._render(messages, tools, prompt=True)
        return list(self._encode(messages, tools, rendered, {}).tokens)

    def _plain(self, example: Example) -> TokenRow:
        tokenizer = self.tokenizer
        texts = [message.content for message in example.messages]
        begin = [] if tokenizer.begin is None else [tokenizer.begin]
        prompt = begin + tokenizer.encode("".join(texts[:-1]))
        answer = [*tokenizer.encode_continuation(texts[-1]), tokenizer.end]
        weight = _weight(example.messages[-1])
        return TokenRow((*prompt, *answer), (0.0,) * len(prompt) + (weight,) * len(answer))

    def _learned(
        self, example: Example, stop: int, rendered: Rendered, candidates: Sequence[int]
    ) -> dict[int, tuple[int, int]]:
        """Which characters of the text are learned for each answer that stands in it as the model would write it."""
        learned: dict[int, tuple[int, int]] = {}
        for place in candidates:
            last = place + 1 == stop
            if place >= stop:
                continue
            start = len(before := self._text(example.messages[:place], example.tools, prompt=True))
            alone = rendered.text if last else self._text(example.messages[: place + 1], example.tools)
            if not alone.startswith(before):
                raise self._refusal(
                    f"message {place + 1:,} does not begin where the prompt for it ends",
                    _difference(alone, before), example.messages[: place + 1],
                )
            if not rendered.text.startswith(before):
                continue
            marks = rendered.of_message(place)
            missing = [
                field for field in fields_of(example.messages[place])
                if (place, field) not in rendered.read.places and not self._may_lack(field)
            ]
            end = self._end_behind(rendered, max([start, *marks]))
            foreign = end is not None and any(
                start < mark < end for (owner, _), where in rendered.read.places.items() if owner != place
                for mark in where
            )
            faithful = end is not None and alone[:end] == rendered.text[:end]
            if faithful and not missing and not foreign and min([start, *marks]) == start:
                assert end is not None
                learned[place] = (start, end)
            elif last:
                raise self._unlearnable(example.messages[:stop], place, missing, end, foreign)
        return learned

    def _unlearnable(
        self, messages: Sequence[Message], place: int, missing: Sequence[str], end: int | None, foreign: bool
    ) -> UserError:
        if missing:
            return self._dropped(messages, place, missing[0])
        if end is None:
            names = ", ".join(name for name, token in self.tokenizer.control.items() if token in self.end_ids)
            return self._refusal(f"message {place + 1:,} has no end", f"none of {names} follows it", messages)
        why = "another message's text stands inside it" if foreign else "its text stands in the prompt too"
        return self._refusal(f"what to learn of message {place + 1:,} cannot be told", why, messages)

    def _end_behind(self, rendered: Rendered, place: int) -> int | None:
        return next(
            (item.stop for item in rendered.controls if item.start >= place and item.token in self.end_ids), None
        )

    def _may_lack(self, field: str) -> bool:
        return ("thinking" if field == "thinking" else "tools") in self._leave_out and field != "content"

    def _encode(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], rendered: Rendered,
        learned: Mapping[int, tuple[int, int]],
    ) -> TokenRow:
        """Ids of a rendered conversation. Text is cut where an answer begins, so that a prompt's ids do not depend
        on what answers it."""
        cuts = {start: stop for start, stop in learned.values()}
        for place, message in enumerate(messages):
            if message.role == ASSISTANT and place not in learned:
                before = self._text(messages[:place], tools, prompt=True)
                if rendered.text.startswith(before):
                    cuts.setdefault(len(before), len(before))
        parts, starts = _parts(rendered, sorted(cuts))
        spans = [(start, stop, _weight(messages[place])) for place, (start, stop) in learned.items()]
        tokens: list[int] = []
        weights: list[float] = []
        for start, ids in zip(starts, self.tokenizer.encode_parts(parts), strict=True):
            weight = next((weight for first, stop, weight in spans if first <= start < stop), 0.0)
            tokens += ids
            weights += [weight] * len(ids)
        return TokenRow(tuple(tokens), tuple(weights))

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, prompt: bool = False
    ) -> Rendered:
        """The conversation's text with proof of what the template wrote in it."""
        for message in messages:
            _require_role(message.role)
        text = self._text(messages, tools, prompt=prompt)
        taken = self._template_letters.union(*characters([as_values(messages), list(tools)]))
        marker = Marker(self._names, taken)
        values = as_values(messages, marker)
        marked = self._run(values, marker.value(list(tools)), prompt, marker)
        read = marker.read(marked)
        if read.text != text:
            raise self._refusal(
                "the template changes with what is said", _difference(text, read.text), messages,
                fix="no control token's name in a message's text, and reasoning in its own field",
            )
        for place, message in enumerate(messages):
            if message.content.strip() and (place, "content") not in read.places:
                raise self._dropped(messages, place, "content")
        if tools and "tools" not in self._leave_out and self._text(messages, (), prompt=prompt) == text:
            raise self._refusal(
                "the template leaves out the tools", "the text is the same without them", messages,
                fix="another template, or leave_out=[tools]",
            )
        return Rendered(text, read, tuple(self._controls(read)))

    def _controls(self, read: Read) -> Iterator[Control]:
        """Names of control tokens that the template wrote: a mark stands inside each of those that users wrote."""
        greedy = self.tokenizer.takes_blanks
        owned = [(where[0], where[-1]) for where in read.places.values()]
        for match in self._names.pattern.finditer(read.with_marks):
            start, stop = read.place(match.start()), read.place(match.end())
            if len(match[0]) == 1 and any(first <= start and stop <= last for first, last in owned):
                continue
            before, behind = greedy.get(match[0], (False, False))
            if before:
                start = len(read.text[:start].rstrip())
            if behind:
                stop += len(read.text[stop:]) - len(read.text[stop:].lstrip())
            yield Control(start, stop, self.tokenizer.control[match[0]])

    def _text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, prompt: bool = False
    ) -> str:
        return self._run(as_values(messages), list(tools), prompt, None)

    def _run(self, values: list[dict[str, Any]], tools: list[Any], prompt: bool, marker: Marker | None) -> str:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        given = {
            **self._roles, "messages": values, "tools": tools or None, "documents": None, "add_generation_prompt": prompt,
        }
        size = sum(map(len, characters([values, tools])))
        return self._templates[name].render(given, size, None if marker is None else marker.of.__contains__)

    @cached_property
    def _roles(self) -> dict[str, str]:
        names = {token: name for name, token in self.tokenizer.control.items()}
        roles = {role: name for role, name in self.tokenizer.roles.items() if name in self.tokenizer.control}
        roles.setdefault("eos_token", names.get(self.tokenizer.end, ""))
        return roles

    def _find_ends(self) -> tuple[int, ...]:
        """The control tokens that end an answer, by trying a question, an answer, and what may come next."""
        question, answer = Message("user", "Is it so?"), Message(ASSISTANT, "It is.")
        call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "this"}}}
        ends = [self._end_of([question, answer])]
        if ends[0] is None:
            raise self._refusal(
                "the template ends no answer with a control token", "a model that never saw an end never stops",
                [question, answer],
                fix=f"a template that writes {{{{ eos_token }}}} behind every answer; or, if it ends them with a name "
                f"that the tokenizer does not know: llmtrainer add-tokens MODEL out=FOLDER tokens=[NAME]",
            )
        for other in (replace(answer, thinking="Let me see."), replace(answer, content="", tool_calls=(call,))):
            try:
                ends.append(self._end_of([question, other]))
            except UserError:   # a template without reasoning or tools; whoever has some is told then
                continue
        return tuple(dict.fromkeys(end for end in ends if end is not None))

    def _end_of(self, messages: list[Message]) -> int | None:
        rendered = self._render(messages, ())
        place = max([0, *rendered.of_message(len(messages) - 1)])
        try:
            following = self._text([*messages, messages[0]], ())
        except UserError:
            following = ""
        # What stands there whatever comes next; nothing, if the template shows an answer otherwise once it lies back.
        shared = len(rendered.text) - len(_behind_common(rendered.text, following))
        behind = [item for item in rendered.controls if item.start >= place]
        always = [item for item in behind if item.stop <= shared]
        return (always or behind)[-1].token if behind else None

    def _dropped(self, messages: Sequence[Message], place: int, field: str) -> UserError:
        message = messages[place]
        kind = {"content": "text", "thinking": "reasoning"}.get(field, "tool calls")
        fix = "another template"
        if field != "content":
            fix += f", or leave_out=[{'thinking' if field == 'thinking' else 'tools'}]"
        return self._refusal(
            f"the template leaves out the {kind} of a message", f"message {place + 1:,} is by {message.role}",
            messages, fix=fix,
        )

    def _refusal(self, what: str, why: str, messages: Sequence[Message], *, fix: str | None = None) -> UserError:
        return UserError(what, where=self._chosen.where, why=why, fix=fix or "another template")


def _weight(message: Message) -> float:
    if message.role != ASSISTANT:
        return 0.0
    return 1.0 if message.weight is None else message.weight


def _parts(rendered: Rendered, cuts: Sequence[int]) -> tuple[list[str | int], list[int]]:
    """Control ids and the text between them, cut where asked, and where each begins."""
    parts: list[str | int] = []
    starts: list[int] = []

    def add_text(start: int, stop: int) -> None:
        edges = [start, *(cut for cut in cuts if start < cut < stop), stop]
        for first, last in zip(edges, edges[1:], strict=False):
            if first < last:
                parts.append(rendered.text[first:last])
                starts.append(first)

    done = 0
    for item in rendered.controls:
        add_text(done, item.start)
        parts.append(item.token)
        starts.append(item.start)
        # Blanks that a control token takes are the prompt's only as far as the prompt goes.
        done = min([item.stop, *(cut for cut in cuts if item.start < cut)])
    add_text(done, len(rendered.text))
    return parts, starts


def _behind_common(text: str, other: str) -> str:
    """What is left of a text behind all that it has in common with the beginning of another."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text.startswith(other[:middle]) else (low, middle - 1)
    return text[low:]


def _difference(one: str, other: str) -> str:
    place = len(one) - len(_behind_common(one, other))
    return f"{one[max(place - 20, 0) : place + 30]!r} against {other[max(place - 20, 0) : place + 30]!r}"


def _require_role(role: str) -> None:
    if not role.replace("_", "a").replace("-", "a").isalnum() or not role.isascii() or len(role) > 64:
        raise UserError(
            f"{role[:80]!r} is no role", why="a role is one plain word: the template writes it among its own",
            fix="system, user, assistant or tool",
        )
