"""Conversations as tokens by any chat template, with proof of which tokens the model is to learn."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from functools import cached_property
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, Message, TokenRow
from llmtrainer.tokenizer.composed import closed, is_alone, joined, opens_reasoning, own_of
from llmtrainer.tokenizer.marks import as_values, fields_of
from llmtrainer.tokenizer.rendered import Rendered, behind_common, difference, parts_of
from llmtrainer.tokenizer.renderer import CALL, QUESTION, Renderer, size_of
from llmtrainer.tokenizer.shrink import smallest
from llmtrainer.tokenizer.template import Chosen, choose, with_template
from llmtrainer.tokenizer.tokenizer import FileTokenizer

ASSISTANT = "assistant"
LEFT_OUT = ("thinking", "tools")
"""What a template may be allowed to leave out."""


class _Texts:
    """A conversation's beginnings as text, each rendered once."""

    def __init__(self, renderer: Renderer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        self.messages, self.tools = messages, tools
        self._renderer = renderer
        self._values = as_values(messages, form=renderer.form)
        self._size = size_of(self._values, tools)
        self._known: dict[tuple[int, bool], str] = {}

    def upto(self, stop: int, *, prompt: bool = False) -> str:
        """The first `stop` messages; as a prompt, with the template's call for an answer."""
        if (stop, prompt) not in self._known:
            self._known[stop, prompt] = self._renderer.text_of(
                self._values[:stop], self.tools, prompt=prompt, size=self._size
            )
        return self._known[stop, prompt]

    def parts(self, place: int) -> bool:
        """Whether an answer begins otherwise than its prompt ends."""
        return not self.upto(place + 1).startswith(self.upto(place, prompt=True))


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
        self._renderer = Renderer(tokenizer, self._chosen, day, self._leave_out)
        self._shown: dict[str, Example] = {}
        """The smallest conversation for each kind of refusal."""
        self._ends_by_next: dict[bool, str] = {}
        """For a template that ends no answer: the name that begins the turn behind a call (True) or behind words."""
        self.end_ids: tuple[int, ...] = self._find_ends()
        """Ids at which an answer stops."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which ids a conversation becomes."""
        decides = {
            "templates": dict(self._chosen.texts), "tokenizer": self.tokenizer.fingerprint,
            "roles": dict(self._renderer.roles),
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
        rendered = self._renderer.render(messages, tools, prompt=True)
        return list(self._encode(_Texts(self._renderer, messages, tools), len(messages), rendered, {}).tokens)

    def plain_prompt(self, text: str) -> list[int]:
        """What a model reads before it goes on with a text, without the template."""
        begin = [] if self.tokenizer.begin is None else [self.tokenizer.begin]
        return begin + self.tokenizer.encode(text)

    def behind_answer(self, messages: Sequence[Message], reply: Message, *, ended: bool) -> list[int]:
        """What a model reads behind its answer to a conversation, up to where it answers again: a reply to it, and the
        template's call. ended: whether the answer has its own end; else the template's is the first id."""
        place = len(messages)
        rendered = self._renderer.render([*messages, Message(ASSISTANT, "It is."), reply], (), prompt=True)
        start = max(rendered.of_message(place))
        end = next((item for item in rendered.controls if item.start >= start and item.token in self.end_ids), None)
        if end is None or end.stop > min(rendered.of_message(place + 1), default=end.stop):
            raise self._renderer.refusal(
                "the template does not end an answer that is replied to", f"the reply is by {reply.role}"
            )
        first = end.stop if ended else end.start
        parts, starts = parts_of(rendered, [first])
        encoded = self.tokenizer.encode_parts(parts)
        return [token for start, ids in zip(starts, encoded, strict=True) if start >= first for token in ids]

    def _plain(self, example: Example) -> TokenRow:
        tokenizer = self.tokenizer
        texts = [message.content for message in example.messages]
        prompt = self.plain_prompt("".join(texts[:-1]))
        answer = [*tokenizer.encode_continuation(texts[-1]), tokenizer.end]
        weight = _weight(example.messages[-1])
        return TokenRow((*prompt, *answer), (0.0,) * len(prompt) + (weight,) * len(answer))

    def _rows(self, example: Example) -> tuple[TokenRow, ...]:
        texts = _Texts(self._renderer, example.messages, example.tools)
        open_turns = [place for place, message in enumerate(example.messages) if _weight(message) > 0]
        rows: list[TokenRow] = []
        stop = len(example.messages)
        while True:
            last = stop - 1
            parts = example.messages[last].role == ASSISTANT and texts.parts(last)
            if open_turns and last > open_turns[-1] and parts:
                last = open_turns[-1]    # what stands behind is not learned, and could not be read in one text
                stop, parts = last + 1, texts.parts(last)
            if parts and (not open_turns or open_turns[-1] == last):
                rendered, learned = self._behind_prompt(texts, last)
                learned = learned if open_turns else {}
            else:
                rendered = self._ended(example.messages[:stop], example.tools, texts.upto(stop))
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
            if texts.parts(place) or not rendered.text.startswith(before):
                continue
            alone += self._ends_by_next.get(bool(texts.messages[place].tool_calls), "")
            start, marks = len(before), rendered.of_message(place)
            missing = [
                field for field in fields_of(texts.messages[place])
                if rendered.read.lacks((place, field)) and not self._may_lack(rendered, place, field)
            ]
            end = self._end_behind(rendered, max([start, *marks]))
            foreign = end is not None and any(
                start < mark < end for (owner, _), where in rendered.read.places.items() if owner != place
                for mark in where
            )
            if end is None or missing or foreign or min([start, *marks]) < start:
                if place + 1 == stop:
                    raise self._unlearnable(rendered, texts.messages[place], place, missing, end)
            elif alone[:end] == rendered.text[:end]:
                learned[place] = (start, end)
        return learned

    def _behind_prompt(self, texts: _Texts, place: int) -> tuple[Rendered, dict[int, tuple[int, int]]]:
        """The prompt for an answer with the answer behind it, where the template parts the two; and what is learned."""
        messages, tools = texts.messages[: place + 1], texts.tools
        prompt = self._renderer.render(messages[:-1], tools, prompt=True, text=texts.upto(place, prompt=True))
        told = [message for message in messages if message.role != "system"]
        before = self._renderer.text(told[:-1], tools, prompt=True)
        # Some templates show the system's text only while they ask: with the answer, it is as if there were none.
        if len(told) < len(messages) and texts.upto(place + 1).startswith(before) and (
            texts.upto(place + 1) == self._renderer.text(told, tools)
        ):
            alone, last = self._ended(told, tools), len(told) - 1
            found: tuple[int, str] | None = (len(before), "")
        else:
            alone, last = self._ended(messages, tools, texts.upto(place + 1)), place
            call = prompt.text.removeprefix(texts.upto(place))
            found = own_of(prompt.text, "" if call == prompt.text else call, alone, messages[-1], place)
        for field in fields_of(messages[-1]):
            filled = field == "thinking" and found is not None and found[1]
            if alone.read.lacks((last, field)) and not self._may_lack(alone, last, field) and not filled:
                raise self._renderer.dropped(messages[-1], place, field, part=(last, field) in alone.read.cut)
        end = None if found is None else self._end_behind(alone, max([found[0], *alone.of_message(last)]))
        if found is None or end is None or not is_alone(alone, last, found[0]):
            raise self._parted(texts, place)
        whole = joined(prompt, found[1], alone, found[0], self.tokenizer.control)
        return whole, {place: (len(prompt.text), end + len(whole.text) - len(alone.text))}

    def _parted(self, texts: _Texts, place: int) -> UserError:
        before, alone = texts.upto(place, prompt=True), texts.upto(place + 1)
        fix, thinks = "another template", bool(texts.messages[place].thinking)
        if opens_reasoning(behind_common(before, alone)) and not thinks:
            fix = "give every answer its reasoning (`thinking` in its message), which the prompt begins; or " + fix
        if any("enable_thinking" in text for text in self._chosen.texts.values()):
            value = "true" if thinks else "false"
            fix += f", say this one in a file of your own with {{%- set enable_thinking = {value} %}} as its first line"
        return self._renderer.refusal(
            f"message {place + 1:,} does not begin where the prompt for it ends",
            f"they part here: {difference(alone, before)}", fix=fix,
        )

    def _ended(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str | None = None
    ) -> Rendered:
        """A conversation rendered; an answer at its end has one, even where the next turn's first token is it."""
        rendered = self._renderer.render(messages, tools, text=text)
        name = self._ends_by_next.get(bool(messages[-1].tool_calls)) if messages[-1].role == ASSISTANT else None
        return rendered if name is None else closed(rendered, name, self.tokenizer.control[name])

    def _unlearnable(
        self, rendered: Rendered, message: Message, place: int, missing: Sequence[str], end: int | None
    ) -> UserError:
        if missing:
            part = (place, missing[0]) in rendered.read.cut
            return self._renderer.dropped(message, place, missing[0], part=part)
        if end is None:
            names = ", ".join(name for name, token in self.tokenizer.control.items() if token in self.end_ids)
            return self._renderer.refusal(f"message {place + 1:,} has no end", f"{names} does not follow it")
        return self._renderer.refusal(
            f"what to learn of message {place + 1:,} cannot be told",
            "its text stands in the prompt for it, or another message's text between its own and its end",
        )

    def _end_behind(self, rendered: Rendered, place: int) -> int | None:
        return next(
            (item.stop for item in rendered.controls if item.start >= place and item.token in self.end_ids), None
        )

    def _may_lack(self, rendered: Rendered, place: int, field: str) -> bool:
        """Whether a field of an answer may be left out; of its text only a part may, which then is reasoning."""
        if field == "content":
            return "thinking" in self._leave_out and (place, field) in rendered.read.places
        return ("thinking" if field == "thinking" else "tools") in self._leave_out

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

    def _find_ends(self) -> tuple[int, ...]:
        """The control tokens that end an answer, by trying a question, an answer, and what may come next."""
        answer = Message(ASSISTANT, "It is.")
        ends = [self._end_of(answer)]
        if ends[0] is None:
            shown = self._renderer.text([QUESTION, answer])[-80:]
            raise self._renderer.refusal(
                "the template ends no answer with a control token",
                f"a model that never saw an end never stops; an answer is: {shown!r}",
                fix="a template that writes {{ eos_token }} behind every answer; or, if it ends answers with a name "
                "that the tokenizer does not know, llmtrainer add-tokens MODEL out=FOLDER tokens=[NAME]",
            )
        for other in (replace(answer, thinking="Let me see."), CALL):
            try:
                ends.append(self._end_of(other))
            except UserError:   # a template without reasoning or tools; whoever has some is told then
                continue
        return tuple(dict.fromkeys(end for end in ends if end is not None))

    def _end_of(self, answer: Message) -> int | None:
        messages = [QUESTION, answer]
        rendered = self._renderer.render(messages, ())
        self._renderer.require_known(rendered)
        if any((1, field) not in rendered.read.places for field in fields_of(answer)):
            return None
        before = self._renderer.text(messages[:1], prompt=True)
        place = max([len(before) if rendered.text.startswith(before) else 0, *rendered.of_message(1)])
        behind = [item for item in rendered.controls if item.start >= place]
        reply = Message("tool", "It is here.") if answer.tool_calls and self._ends_by_next else QUESTION
        try:
            following = self._renderer.render([*messages, reply], ())
        except UserError:
            return behind[-1].token if behind else None
        # What stands there whatever comes next; nothing, if the template shows an answer otherwise once it lies back.
        shared = len(rendered.text) - len(behind_common(rendered.text, following.text))
        always = [item for item in behind if item.stop <= shared]
        if (not behind or self._ends_by_next) and shared == len(rendered.text):
            # No end of its own: the model is stopped at the token that begins the next turn.
            behind = [item for item in following.controls if item.start == shared]
            names = {token: name for name, token in self.tokenizer.control.items()}
            self._ends_by_next |= {bool(answer.tool_calls): names[item.token] for item in behind}
            always = []
        ends = [item.token for item in always or behind]
        return self.tokenizer.end if self.tokenizer.end in ends else next(reversed(ends), None)

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

