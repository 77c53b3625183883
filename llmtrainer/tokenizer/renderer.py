"""A conversation by a template, with proof of what the template wrote in it and what users did."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Message
from llmtrainer.tokenizer.marks import Form, Marker, Names, Read, as_values, characters
from llmtrainer.tokenizer.rendered import Control, Rendered, difference
from llmtrainer.tokenizer.sandbox import Template
from llmtrainer.tokenizer.template import Chosen
from llmtrainer.tokenizer.tokenizer import FileTokenizer

_LOOKS_LIKE_CONTROL = re.compile(r"<\|[^|<>\s]{1,60}\|>")
QUESTION = Message("user", "Is it so?")
CALL = Message("assistant", "", tool_calls=(
    {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "this"}}},
))
"""What templates are tried with."""


class Renderer:
    """A template with a tokenizer's names: what it makes of a conversation, and where everything is from."""

    def __init__(
        self, tokenizer: FileTokenizer, chosen: Chosen, day: date | None, leave_out: frozenset[str]
    ) -> None:
        self.tokenizer, self.where = tokenizer, chosen.where
        self._leave_out = leave_out
        self._templates = {name: Template(text, chosen.where, day) for name, text in chosen.texts.items()}
        self._names = Names(list(tokenizer.control))
        self._template_letters = set("".join(chosen.texts.values()))
        self.form = Form()
        """How the template reads contents and calls."""
        self.form = self._find_form()

    def text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, prompt: bool = False
    ) -> str:
        """What the template makes of a conversation; with `prompt`, with its call for an answer."""
        return self.text_of(as_values(messages, form=self.form), tools, prompt=prompt)

    def text_of(
        self, values: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], *, prompt: bool,
        size: int | None = None,
    ) -> str:
        """The same of messages as the template reads them. `size`: of the conversation that they begin, if known."""
        return self._run(values, list(tools), prompt, None, size)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, prompt: bool = False,
        text: str | None = None,
    ) -> Rendered:
        """The conversation's text with proof of what the template wrote in it. `text`: that text, if it is known."""
        for message in messages:
            _require_role(message.role)
        text = self.text(messages, tools, prompt=prompt) if text is None else text
        taken = self._template_letters.union(*characters([as_values(messages, form=self.form), list(tools)]))
        marker = Marker(self._names, taken)
        values = as_values(messages, marker, self.form)
        read = marker.read(self._run(values, marker.value(list(tools)), prompt, marker))
        if read.text != text:
            raise self.refusal(
                "the template does not write what is said as it is said",
                f"a mark in a message changes the text: {difference(text, read.text)}",
                fix="no control token's name in a message, and reasoning in a field of its own; or another template",
            )
        for place, message in enumerate(messages):
            if message.content.strip() and (place, "content") not in read.places:
                raise self.dropped(message, place, "content")
            if message.role != "assistant" and (place, "content") in read.cut:
                raise self.dropped(message, place, "content", part=True)
        if tools and "tools" not in self._leave_out and self.text(messages, prompt=prompt) == text:
            raise self.refusal(
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
            if any(first <= start and stop <= last for first, last in read.said):
                raise self.refusal(
                    f"the template makes {match[0]} of what a message says",
                    "it changes letters: nobody else wrote that control token",
                )
            before, behind = greedy.get(match[0], (False, False))
            yield Control(
                start, stop, self.tokenizer.control[match[0]],
                start - len(read.text[:start].rstrip()) if before else 0,
                len(read.text) - stop - len(read.text[stop:].lstrip()) if behind else 0,
            )

    def require_known(self, rendered: Rendered) -> None:
        """Refuse a template that writes what looks like a control token and is ordinary text to this tokenizer."""
        places = {item.start for item in rendered.controls}
        unknown = [
            match[0] for match in _LOOKS_LIKE_CONTROL.finditer(rendered.text) if match.start() not in places
        ]
        if unknown:
            named = ",".join(f"'{name}'" for name in dict.fromkeys(unknown))
            raise self.refusal(
                f"the template writes {unknown[0]}, which is no control token of the tokenizer",
                "it would be ordinary text, which users can write too",
                fix=f'llmtrainer add-tokens MODEL out=FOLDER "tokens=[{named}]"',
            )

    def dropped(self, message: Message, place: int, field: str, *, part: bool = False) -> UserError:
        """The refusal of a template that does not write a field of a message, or only a part of it."""
        kind = {"content": "text", "thinking": "reasoning"}.get(field, "tool calls")
        fix = "another template"
        if part and field == "content" and message.role == "assistant":
            fix = "reasoning in a field of its own (`thinking`), another template, or leave_out=[thinking]"
        if field != "content":
            fix += f", or leave_out=[{'thinking' if field == 'thinking' else 'tools'}]"
        return self.refusal(
            f"the template leaves out {'a part of ' if part else ''}the {kind} of a message",
            f"message {place + 1:,} is by {message.role}", fix=fix,
        )

    def refusal(self, what: str, why: str, *, fix: str = "another template") -> UserError:
        return UserError(what, where=self.where, why=why, fix=fix)

    def _find_form(self) -> Form:
        """Contents as text and arguments as objects, as transformers documents it, unless the template reads them
        otherwise: contents as lists of parts (those of models that see), arguments as the text of their JSON."""
        form = Form()
        if not self._says([QUESTION], form, QUESTION.content):
            in_parts = Form(parts=True)
            form = in_parts if self._says([QUESTION], in_parts, QUESTION.content) else form
        if not self._says([QUESTION, CALL], form, ""):
            written = Form(form.parts, arguments_as_text=True)
            form = written if self._says([QUESTION, CALL], written, "this") else form
        return form

    def _says(self, messages: Sequence[Message], form: Form, text: str) -> bool:
        try:
            return text in self._run(as_values(messages, form=form), [], False, None)
        except UserError:    # a template that refuses this form, or both: then whoever asks is told
            return False

    def _run(
        self, values: list[dict[str, Any]], tools: list[Any], prompt: bool, marker: Marker | None,
        size: int | None = None,
    ) -> str:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        given = {
            **self.roles, "messages": values, "tools": tools or None, "documents": None,
            "add_generation_prompt": prompt,
        }
        size = size_of(values, tools) if size is None else size
        return self._templates[name].render(given, size, None if marker is None else marker.of.__contains__)

    @cached_property
    def roles(self) -> dict[str, str]:
        names = {token: name for name, token in self.tokenizer.control.items()}
        roles = {role: name for role, name in self.tokenizer.roles.items() if name in self.tokenizer.control}
        roles.setdefault("eos_token", names.get(self.tokenizer.end, ""))
        return roles


def size_of(values: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
    """Characters of a conversation, to which a template's bounds are relative."""
    return sum(map(len, characters([values, tools])))


def _require_role(role: str) -> None:
    if not role.replace("_", "a").replace("-", "a").isalnum() or not role.isascii() or len(role) > 64:
        raise UserError(
            f"{role[:80]!r} is no role", why="a role is one plain word: the template writes it among its own",
            fix="system, user, assistant or tool",
        )
