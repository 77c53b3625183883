"""Conversations as tokens by any chat template, with proof of which tokens the model is to learn."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from functools import cached_property
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, Message, TokenRow
from llmtrainer.tokenizer.marks import Marker, Names, Read, as_values, characters, fields_of
from llmtrainer.tokenizer.rendered import Control, Rendered, behind_common, difference, parts_of
from llmtrainer.tokenizer.sandbox import Template
from llmtrainer.tokenizer.shrink import smallest
from llmtrainer.tokenizer.template import Chosen, choose, with_template
from llmtrainer.tokenizer.tokenizer import FileTokenizer

ASSISTANT = "assistant"
LEFT_OUT = ("thinking", "tools")
"""What a template may be allowed to leave out."""
_LOOKS_LIKE_CONTROL = re.compile(r"<\|[^|<>\s]{1,60}\|>")


class _Texts:
    """A conversation's beginnings as text, each rendered once."""

    def __init__(self, chat: Chat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        self.messages, self.tools = messages, tools
        self._chat = chat
        self._known: dict[tuple[int, bool], str] = {}

    def upto(self, stop: int, *, prompt: bool = False) -> str:
        """The first `stop` messages; as a prompt, with the template's call for an answer."""
        if (stop, prompt) not in self._known:
            self._known[stop, prompt] = self._chat.text(self.messages[:stop], self.tools, prompt=prompt)
        return self._known[stop, prompt]


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
        for name in leave_out:
            if name not in LEFT_OUT:
                raise UserError(f"leave_out has {name!r}", why=f"what may be left out: {', '.join(LEFT_OUT)}")
        self._chosen: Chosen = choose(tokenizer, template)
        self.tokenizer = with_template(tokenizer, self._chosen)
        """The tokenizer, with the template among its files: who loads what is saved of it needs no name for it."""
        self._day, self._leave_out = day, frozenset(leave_out)
        self._templates = {name: Template(text, self._chosen.where, day) for name, text in self._chosen.texts.items()}
        self._names = Names(list(tokenizer.control))
        self._template_letters = set("".join(self._chosen.texts.values()))
        self._shown: dict[str, Example] = {}
        """The smallest conversation for each kind of refusal."""
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
        """The last of `rows`: the whole conversation or its beginning up to the last answer.

        A template that rewrites what lies back (one that drops earlier reasoning) shows earlier answers otherwise;
        those are only read in this row.
        """
        return self.rows(example)[-1]

    def rows(self, example: Example) -> tuple[TokenRow, ...]:
        """As few rows as it takes to learn every answer once, as the model would be asked to write it. One, unless
        the template rewrites what lies back; then the others are the conversation up to an earlier answer."""
        if example.plain:
            return (self._plain(example),)
        try:
            return self._rows(example)
        except UserError as error:
            shown = self._smallest(example, error)
            told = json.dumps(_told(shown), ensure_ascii=False)
            told = told if len(told) <= 1_000 else f"{told[:1_000]} ..."
            raise UserError(
                error.what, where=error.where, fix=error.fix,
                why=f"{error.why}\n        the smallest conversation that shows it: {told}",
            ) from None

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """What a model reads before it answers: the conversation and the template's call for an answer."""
        rendered = self._render(messages, tools, prompt=True)
        return list(self._encode(_Texts(self, messages, tools), len(messages), rendered, {}).tokens)

    def plain_prompt(self, text: str) -> list[int]:
        """What a model reads before it goes on with a text, without the template."""
        begin = [] if self.tokenizer.begin is None else [self.tokenizer.begin]
        return begin + self.tokenizer.encode(text)

    def behind_answer(self, messages: Sequence[Message], reply: Message, *, ended: bool) -> list[int]:
        """What a model reads behind its answer to a conversation, up to where it answers again: a reply to it, and the
        template's call. ended: whether the answer has its own end; else the template's is the first id."""
        place = len(messages)
        rendered = self._render([*messages, Message(ASSISTANT, "It is."), reply], (), prompt=True)
        start = max(rendered.of_message(place))
        end = next((item for item in rendered.controls if item.start >= start and item.token in self.end_ids), None)
        if end is None or end.stop > min(rendered.of_message(place + 1), default=end.stop):
            raise self._refusal(
                "the template does not end an answer that is replied to", f"the reply is by {reply.role}"
            )
        first = end.stop if ended else end.start
        parts, starts = parts_of(rendered, [first])
        encoded = self.tokenizer.encode_parts(parts)
        return [token for start, ids in zip(starts, encoded, strict=True) if start >= first for token in ids]

    def text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, prompt: bool = False
    ) -> str:
        """What the template makes of a conversation; with `prompt`, with its call for an answer."""
        return self._run(as_values(messages), list(tools), prompt, None)

    def _plain(self, example: Example) -> TokenRow:
        tokenizer = self.tokenizer
        texts = [message.content for message in example.messages]
        prompt = self.plain_prompt("".join(texts[:-1]))
        answer = [*tokenizer.encode_continuation(texts[-1]), tokenizer.end]
        weight = _weight(example.messages[-1])
        return TokenRow((*prompt, *answer), (0.0,) * len(prompt) + (weight,) * len(answer))

    def _rows(self, example: Example) -> tuple[TokenRow, ...]:
        texts = _Texts(self, example.messages, example.tools)
        open_turns = [place for place, message in enumerate(example.messages) if _weight(message) > 0]
        rows: list[TokenRow] = []
        stop = len(example.messages)
        while True:
            rendered = self._render(example.messages[:stop], example.tools)
            learned = self._learned(texts, stop, rendered, open_turns)
            if learned or not open_turns:
                rows.append(self._encode(texts, stop, rendered, learned))
            open_turns = [place for place in open_turns if place not in learned]
            if not open_turns:
                return tuple(reversed(rows))
            stop = open_turns[-1] + 1

    def _learned(
        self, texts: _Texts, stop: int, rendered: Rendered, candidates: Sequence[int]
    ) -> dict[int, tuple[int, int]]:
        """Which characters of the text are learned for each answer that stands in it as the model would write it."""
        learned: dict[int, tuple[int, int]] = {}
        for place in candidates:
            before, alone = texts.upto(place, prompt=True), texts.upto(place + 1)
            if not alone.startswith(before):
                raise self._refusal(
                    f"message {place + 1:,} does not begin where the prompt for it ends",
                    f"they part here: {difference(alone, before)}",
                )
            if not rendered.text.startswith(before):
                continue
            start, marks = len(before), rendered.of_message(place)
            missing = [
                field for field in fields_of(texts.messages[place])
                if (place, field) not in rendered.read.places and not self._may_lack(field)
            ]
            end = self._end_behind(rendered, max([start, *marks]))
            foreign = end is not None and any(
                start < mark < end for (owner, _), where in rendered.read.places.items() if owner != place
                for mark in where
            )
            if end is None or missing or foreign or min([start, *marks]) < start:
                if place + 1 == stop:
                    raise self._unlearnable(texts.messages[place], place, missing, end)
            elif alone[:end] == rendered.text[:end]:
                learned[place] = (start, end)
        return learned

    def _unlearnable(self, message: Message, place: int, missing: Sequence[str], end: int | None) -> UserError:
        if missing:
            return self._dropped(message, place, missing[0])
        if end is None:
            names = ", ".join(name for name, token in self.tokenizer.control.items() if token in self.end_ids)
            return self._refusal(f"message {place + 1:,} has no end", f"{names} does not follow it")
        return self._refusal(
            f"what to learn of message {place + 1:,} cannot be told",
            "its text stands in the prompt for it, or another message's text between its own and its end",
        )

    def _end_behind(self, rendered: Rendered, place: int) -> int | None:
        return next(
            (item.stop for item in rendered.controls if item.start >= place and item.token in self.end_ids), None
        )

    def _may_lack(self, field: str) -> bool:
        return field != "content" and ("thinking" if field == "thinking" else "tools") in self._leave_out

    def _encode(
        self, texts: _Texts, stop: int, rendered: Rendered, learned: Mapping[int, tuple[int, int]]
    ) -> TokenRow:
        """Ids of a rendered conversation. Text is cut where an answer begins, so that a prompt's ids do not depend
        on what answers it."""
        cuts = []
        for place, message in enumerate(texts.messages[:stop]):
            if message.role == ASSISTANT and rendered.text.startswith(before := texts.upto(place, prompt=True)):
                cuts.append(len(before))
        parts, starts = parts_of(rendered, sorted(set(cuts)))
        spans = [(start, end, _weight(texts.messages[place])) for place, (start, end) in learned.items()]
        tokens: list[int] = []
        weights: list[float] = []
        for start, ids in zip(starts, self.tokenizer.encode_parts(parts), strict=True):
            weight = next((weight for first, end, weight in spans if first <= start < end), 0.0)
            tokens += ids
            weights += [weight] * len(ids)
        return TokenRow(tuple(tokens), tuple(weights))

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, prompt: bool = False
    ) -> Rendered:
        """The conversation's text with proof of what the template wrote in it."""
        for message in messages:
            _require_role(message.role)
        text = self.text(messages, tools, prompt=prompt)
        taken = self._template_letters.union(*characters([as_values(messages), list(tools)]))
        marker = Marker(self._names, taken)
        values = as_values(messages, marker)
        read = marker.read(self._run(values, marker.value(list(tools)), prompt, marker))
        if read.text != text:
            raise self._refusal(
                "the template does not write what is said as it is said",
                f"a mark in a message changes the text: {difference(text, read.text)}",
                fix="no control token's name in a message, and reasoning in a field of its own; or another template",
            )
        for place, message in enumerate(messages):
            if message.content.strip() and (place, "content") not in read.places:
                raise self._dropped(message, place, "content")
        if tools and "tools" not in self._leave_out and self.text(messages, prompt=prompt) == text:
            raise self._refusal(
                "the template leaves out the tools", "the text is the same without them",
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
            yield Control(
                start, stop, self.tokenizer.control[match[0]],
                start - len(read.text[:start].rstrip()) if before else 0,
                len(read.text) - stop - len(read.text[stop:].lstrip()) if behind else 0,
            )

    def _run(self, values: list[dict[str, Any]], tools: list[Any], prompt: bool, marker: Marker | None) -> str:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        given = {
            **self._roles, "messages": values, "tools": tools or None, "documents": None,
            "add_generation_prompt": prompt,
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
                "the template ends no answer with a control token",
                f"a model that never saw an end never stops; an answer is: {self.text([question, answer])[-80:]!r}",
                fix="a template that writes {{ eos_token }} behind every answer; or, if it ends answers with a name "
                "that the tokenizer does not know, llmtrainer add-tokens MODEL out=FOLDER tokens=[NAME]",
            )
        for other in (replace(answer, thinking="Let me see."), replace(answer, content="", tool_calls=(call,))):
            try:
                ends.append(self._end_of([question, other]))
            except UserError:   # a template without reasoning or tools; whoever has some is told then
                continue
        return tuple(dict.fromkeys(end for end in ends if end is not None))

    def _end_of(self, messages: list[Message]) -> int | None:
        rendered, last = self._render(messages, ()), len(messages) - 1
        self._require_known(rendered)
        if any((last, field) not in rendered.read.places for field in fields_of(messages[-1])):
            return None
        before = self.text(messages[:-1], prompt=True)
        place = max([len(before) if rendered.text.startswith(before) else 0, *rendered.of_message(last)])
        try:
            following = self.text([*messages, messages[0]])
        except UserError:
            following = ""
        # What stands there whatever comes next; nothing, if the template shows an answer otherwise once it lies back.
        shared = len(rendered.text) - len(behind_common(rendered.text, following))
        behind = [item for item in rendered.controls if item.start >= place]
        always = [item for item in behind if item.stop <= shared]
        return (always or behind)[-1].token if behind else None

    def _require_known(self, rendered: Rendered) -> None:
        """Refuse a template that writes what looks like a control token and is ordinary text to this tokenizer."""
        places = {item.start for item in rendered.controls}
        unknown = [
            match[0] for match in _LOOKS_LIKE_CONTROL.finditer(rendered.text) if match.start() not in places
        ]
        if unknown:
            named = ",".join(f"'{name}'" for name in dict.fromkeys(unknown))
            raise self._refusal(
                f"the template writes {unknown[0]}, which is no control token of the tokenizer",
                "it would be ordinary text, which users can write too",
                fix=f'llmtrainer add-tokens MODEL out=FOLDER "tokens=[{named}]"',
            )

    def _smallest(self, example: Example, error: UserError) -> Example:
        kind = re.sub(r"\d+", "", error.what)

        def fails(other: Example) -> bool:
            try:
                self._rows(other)
            except UserError as found:
                return re.sub(r"\d+", "", found.what) == kind
            return False

        if kind not in self._shown:
            self._shown[kind] = smallest(example, fails)
        return self._shown[kind]

    def _dropped(self, message: Message, place: int, field: str) -> UserError:
        kind = {"content": "text", "thinking": "reasoning"}.get(field, "tool calls")
        fix = "another template"
        if field != "content":
            fix += f", or leave_out=[{'thinking' if field == 'thinking' else 'tools'}]"
        return self._refusal(
            f"the template leaves out the {kind} of a message", f"message {place + 1:,} is by {message.role}", fix=fix
        )

    def _refusal(self, what: str, why: str, *, fix: str = "another template") -> UserError:
        return UserError(what, where=self._chosen.where, why=why, fix=fix)


def _weight(message: Message) -> float:
    if message.role != ASSISTANT:
        return 0.0
    return 1.0 if message.weight is None else message.weight


def _told(example: Example) -> dict[str, Any]:
    """An example as the JSON that people write."""
    messages = [
        {key: value for key, value in asdict(message).items() if value not in (None, ())}
        for message in example.messages
    ]
    return {"messages": messages, **({"tools": list(example.tools)} if example.tools else {})}


def _require_role(role: str) -> None:
    if not role.replace("_", "a").replace("-", "a").isalnum() or not role.isascii() or len(role) > 64:
        raise UserError(
            f"{role[:80]!r} is no role", why="a role is one plain word: the template writes it among its own",
            fix="system, user, assistant or tool",
        )
