"""Chat templates that others published, held against conversations of which every text is known by a word of its own.

`python -m tests.tokenizer.published FOLDER --tokenizer TOKENIZER` reads every .jinja file of a folder, draws 2,000
conversations for each, and prints what was proved, what was refused and why, and what was wrong. The oracle is
transformers: its rendering says where the prompt for an answer ends, and its `{% generation %}` blocks, where a
template has them, what is learned.
No published template lies in this repository: trl has some in its package (trl/chat_templates), axolotl in its source.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, Message, TokenRow
from llmtrainer.tokenizer.added import with_tokens
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.marks import Form, as_values
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from tests.tokenizer.conversations import TOOL, WORD, Draw, Takes, call_of, tame

DAY = date(2026, 3, 9)
_NAME = re.compile(
    r"<\|[^|<>\s'\"{}]{1,60}\|>|<\uff5c[^\uff5c<>]{1,60}\uff5c>|</?[a-z_][a-z_0-9:]*>|\[/?[A-Z][A-Z_]+\]"
    r"|<\|[a-z_\"]+>|<[a-z_\"]+\|>|<[A-Z_0-9]{4,}>|\[\|[^|\[\]\s]{1,40}\|\]|\]~!?b\[?\]|\[e~\["
)
"""What templates write that their own tokenizers know as one token."""
ENDS = (
    "<|END_OF_TURN_TOKEN|>", "<|return|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eot_id|>", "<|eot|>",
    "<turn|>", "<end_of_turn>", "<end_of_utterance>", "[|endofturn|]", "<|im_end|>", "<|assistant_end|>", "<seed:eos>",
    "[e~[", "<|end_of_text|>", "<SPECIAL_12>", "<|role_end|>", "<|end|>",
)  # fmt: skip
"""What ends the answers of published models, by hand: the first that a template names is its tokenizer's end."""


def names_in(source: str) -> list[str]:
    return list(dict.fromkeys(_NAME.findall(source)))


@dataclass
class Result:
    """What became of the conversations drawn for one template."""

    name: str
    refused: str = ""
    """Why the template is refused whatever it is given."""
    ends: tuple[str, ...] = ()
    takes: Takes = field(default_factory=Takes)
    lacks: list[str] = field(default_factory=list)
    """What it is not given, since it is refused, and why."""
    compared: int = 0
    """Conversations whose mask by transformers was compared too."""
    proved: int = 0
    answers: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.refused:
            return f"{self.name}: refused: {self.refused}"
        takes = [name for name in ("system", "tools") if getattr(self.takes, name)]
        told = f"{self.name}: {self.proved:,} proved ({self.answers:,} answers), {len(self.wrong):,} wrong, "
        told += f"{sum(self.refusals.values()):,} refused; ends {' '.join(self.ends)}; "
        told += f"takes {', '.join([*takes, f'reasoning {self.takes.reasoning}'])}"
        told += f"; {self.compared:,} masks of transformers compared" * bool(self.compared)
        lines = [f"    not given {what}" for what in self.lacks]
        lines += [f"    {count:,} x {why}" for why, count in self.refusals.most_common(6)]
        return "\n".join([told, *lines, *(f"    WRONG {what}" for what in self.wrong[:3])])


class Proof:
    """One template: what this program makes of conversations, and what transformers does."""

    def __init__(self, tokenizer: FileTokenizer, file: Path) -> None:
        source = file.read_text(encoding="utf-8")
        end = next((name for name in ENDS if name in source), None)
        self.names = [
            name for name in names_in(source) if name in tokenizer.control or tokenizer.numbered(name) is None
        ]
        tokenizer = with_tokens(tokenizer, self.names)
        if end is not None:
            files = tokenizer.files()
            config = json.loads(files["tokenizer_config.json"]) | {"eos_token": end}
            tokenizer = FileTokenizer({**files, "tokenizer_config.json": json.dumps(config)})
        tokenizer = self._with_what_is_lacking(tokenizer, file)
        self.source, self.tokenizer = source, tokenizer
        self.chat = Chat(tokenizer, str(file), day=DAY)
        self.ends = tuple(name for name, token in tokenizer.control.items() if token in self.chat.end_ids)
        self._roles = {role: name for role, name in tokenizer.roles.items() if name in tokenizer.control}
        self._by_id = {token: name for name, token in tokenizer.control.items()}
        self._pattern = re.compile("|".join(map(re.escape, sorted(tokenizer.control, key=len, reverse=True))))
        self._roles.setdefault("eos_token", self._by_id.get(tokenizer.end, ""))
        self._form = self._find_form()
        self.marked, self.compared = re.search(r"\{%-?\s*generation", source) is not None, 0

    def _with_what_is_lacking(self, tokenizer: FileTokenizer, file: Path) -> FileTokenizer:
        """Names that a template puts together, added as its refusal says."""
        for _ in range(8):
            try:
                Chat(tokenizer, str(file), day=DAY)
            except UserError as error:
                lacking = re.search(r"writes (\S+), which is no control token", error.what)
                if lacking is None:
                    raise
                tokenizer = with_tokens(tokenizer, [lacking[1]])
                self.names.append(lacking[1])
                continue
            break
        return tokenizer

    @cached_property
    def compiled(self) -> Any:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return _compile_jinja_template(self.source)

    def text(self, messages: Sequence[Message], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        """As transformers renders it."""
        return self._render(as_values(messages, form=self._form), tools, prompt)[0]

    def spans(self, example: Example) -> list[tuple[int, int]]:
        """What transformers learns, in characters."""
        return self._render(as_values(example.messages, form=self._form), example.tools, False)[1]

    def takes(self) -> tuple[Takes, list[str]]:
        """By tame conversations, one for each thing; and why the others are refused."""
        user, answer = Message("user", "a question"), Message("assistant", "an answer")
        thought = replace(answer, thinking="because")
        two = (user, answer, user, answer)
        refused: list[str] = []

        def holds(what: str, *messages: Message, tools: tuple[Any, ...] = ()) -> bool:
            try:
                self.chat.rows(Example(messages, tools))
            except UserError as error:
                refused.append(f"{what}: {error.what}")
                return False
            return True

        plain = holds("answers", *two)
        reasons = holds("reasoning", *(replace(one, thinking="why") if one.role == "assistant" else one for one in two))
        last = answer if plain else thought
        if not plain and not reasons:
            return Takes(), refused
        thinking = "why" if not plain else None
        return Takes(
            system=holds("a system text", Message("system", "a rule"), user, last),
            tools=holds(
                "tools", user, Message("assistant", "", thinking, tool_calls=(call_of("call00001", "here"),)),
                Message("tool", "found", name="look", tool_call_id="call00001"), last, tools=(TOOL,),
            ),
            reasoning="never" if not reasons else "sometimes" if plain else "always",
            empty=holds("an empty question", Message("user", ""), last)
            and holds("an empty answer", user, replace(last, content="")),
        ), refused

    def check(self, example: Example) -> Iterator[str]:
        """What is wrong with a conversation's rows."""
        rows, tools = self.chat.rows(example), example.tools
        before = {
            place: self.text(example.messages[:place], tools, prompt=True)
            for place, message in enumerate(example.messages) if message.role == "assistant"
        }
        wanted = {before[place]: place for place in before if example.messages[place].weight != 0.0}
        bare, found = tame(example), list[int]()
        for row in rows:
            for start, stop in runs(row):
                place = wanted.get(self.tokenizer.decode(row.tokens[:start]))
                if place is None:
                    yield f"learned behind no prompt: {self.tokenizer.decode(row.tokens[start:stop])!r}"
                    continue
                found.append(place)
                yield from self._check_answer(example, before[place], place, row, (start, stop))
                yield from self._check_controls(bare.messages[:place], tools, row.tokens[:start], prompt=True)
        if sorted(found) != sorted(wanted.values()):
            yield f"messages {sorted(found)} are learned, not {sorted(wanted.values())}"
        whole = self.text(example.messages, tools)
        # Where a template shows a conversation otherwise once it goes on, its blocks mark what no model is asked for.
        if self.marked and len(rows) == 1 and self.tokenizer.decode(rows[0].tokens) == whole:
            self.compared += 1
            yield from self._check_marks(example, whole, before, rows[0])

    def _check_answer(
        self, example: Example, before: str, place: int, row: TokenRow, where: tuple[int, int]
    ) -> Iterator[str]:
        (start, stop), message, tools = where, example.messages[place], example.tools
        weight = 1.0 if message.weight is None else message.weight
        if set(row.weights[start:stop]) != {weight}:
            yield f"message {place} weighs {set(row.weights[start:stop])}"
        if place < 4 and list(row.tokens[:start]) != self.chat.prompt(example.messages[:place], tools):
            yield f"the prompt for message {place} has other ids"
        if row.tokens[stop - 1] not in self.chat.end_ids:
            yield f"message {place} is learned without its end"
        text = self.tokenizer.decode(row.tokens[start:stop])
        whole = self.text(example.messages[: place + 1], tools)
        first = len(before) if whole.startswith(before) else self._own(example, place, whole)
        end = self._end(message, whole, first)
        allowed = {whole[first:end]} if end else {whole[first:] + name for name in self.ends}
        if whole.startswith(before) and text not in allowed:
            yield f"of message {place} is learned {text!r}, not {allowed}"
        if not any(text.endswith(one) for one in allowed):
            yield f"message {place} is learned to {text!r}, not to {allowed}"
        own = set(WORD.findall(json.dumps([message.content, message.thinking, list(message.tool_calls)])))
        if foreign := set(WORD.findall(text)) - own:
            yield f"with message {place} is learned {foreign} of others"

    def _own(self, example: Example, place: int, whole: str) -> int:
        """Where the first own word of a message stands, with its own text before it left out."""
        words = WORD.findall(example.messages[place].content)
        return whole.index(words[0]) if words else len(whole)

    def _end(self, message: Message, whole: str, first: int) -> int:
        """Behind the first end that follows the last word of a message and what its text says behind that word."""
        texts = [message.content, message.thinking or ""]
        texts += [call["function"]["arguments"]["at"] for call in message.tool_calls]
        stop = first
        for text in texts:
            for word in WORD.findall(text):
                found = whole.rfind(word)
                if found < 0:
                    continue
                tail = text[text.index(word) + len(word) :]
                written = [tail, tail.rstrip(), tail.replace("'", "\\'")]
                written += [json.dumps(tail, ensure_ascii=ascii)[1:-1] for ascii in (True, False)]
                shown = [one for one in written if whole.startswith(one, found + len(word))]
                stop = max(stop, found + len(word) + max(map(len, shown), default=0))
        ends = [whole.index(name, stop) + len(name) for name in self.ends if name in whole[stop:]]
        return min(ends, default=0)

    def _check_marks(
        self, example: Example, whole: str, before: Mapping[int, str], row: TokenRow
    ) -> Iterator[str]:
        """Whatever is learned is marked, and what is marked of an answer is learned: its own words. What their blocks
        hold besides, of the prompt or behind the end, no model is asked for."""
        blocks = self.spans(example)
        theirs = [any(start <= place < stop for start, stop in blocks) for place in range(len(whole))]
        for start, stop in runs(row):
            first = len(self.tokenizer.decode(row.tokens[:start]))
            last = first + len(self.tokenizer.decode(row.tokens[start:stop]))
            if not all(theirs[first:last]):
                yield f"{whole[first:last]!r} is learned and not all of it marked"
            theirs[first:last] = [False] * (last - first)
        for place, message in enumerate(example.messages):
            if message.role == "assistant" and message.weight != 0.0:
                said = len(before[place])
                words = [word for word in WORD.findall(message.content) if any(
                    theirs[at] for at in range(whole.find(word, said), whole.find(word, said) + len(word))
                )]
                if words:
                    yield f"message {place} is marked and not learned"

    def _check_controls(
        self, bare: Sequence[Message], tools: Sequence[Any], tokens: Sequence[int], *, prompt: bool = False
    ) -> Iterator[str]:
        """Where texts can forge nothing, every name in the text is one that the template wrote."""
        written = self._pattern.findall(self.text(bare, tools, prompt=prompt))
        names = [self._by_id[token] for token in tokens if token in self._by_id]
        if names != written:
            yield f"control tokens are {names}, the template writes {written}"

    def _find_form(self) -> Form:
        question = [Message("user", "zq1z")]
        ours = self.tokenizer.decode(self.chat.prompt(question))
        parts = next(
            parts for parts in (False, True)
            if _quiet(lambda: self._render(as_values(question, form=Form(parts)), (), True)[0]) == ours  # noqa: B023
        )
        called = [*question, Message("assistant", "", tool_calls=(call_of("call00001", "zq2z"),))]
        shown = _quiet(lambda: self._render(as_values(called, form=Form(parts)), (), False)[0])
        return Form(parts, arguments_as_text="zq2z" not in shown)

    def _render(self, values: list[Any], tools: Sequence[Any], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        clock = datetime.combine(DAY, time()).strftime
        return _render_with_assistant_indices(
            self.compiled, values, list(tools) or None, None, prompt, strftime_now=clock, **self._roles
        )


def _quiet(render: Callable[[], str]) -> str:
    try:
        return render()
    except Exception:    # whatever a template does with values of a form that it does not know
        return ""


def runs(row: TokenRow) -> list[tuple[int, int]]:
    """Learned stretches. Two answers touch only where the template writes nothing between them, which none does."""
    edges = [place for place in range(len(row.weights) + 1) if _weight(row, place) != _weight(row, place - 1)]
    return [(start, stop) for start, stop in itertools.pairwise(edges) if row.weights[start]]


def _weight(row: TokenRow, place: int) -> float:
    return row.weights[place] if 0 <= place < len(row.weights) else 0.0


def prove(file: Path, tokenizer: FileTokenizer, count: int) -> Result:
    """Draw conversations for one template until `count` were tried."""
    result = Result(file.stem)
    try:
        proof = Proof(tokenizer, file)
    except UserError as error:
        result.refused = f"{error.what} ({error.why})"
        return result
    result.ends = proof.ends
    result.takes, refused = proof.takes()
    if any(why.startswith("answers:") for why in refused) and result.takes.reasoning == "never":
        result.refused = "; ".join(refused)
        return result
    result.lacks = refused
    draw = Draw(result.takes, proof.names, file.stem)
    for _ in range(count):
        example = draw.conversation()
        try:
            wrong = list(proof.check(example))
        except UserError as error:
            result.refusals[re.sub(r"\d+", "N", error.what)] += 1
            continue
        result.answers += sum(one.role == "assistant" and one.weight != 0.0 for one in example.messages)
        result.proved += not wrong
        result.wrong += [f"{what}\n      of {example.messages}" for what in wrong[:1]]
    result.compared = proof.compared
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conversations", type=int, default=2_000)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer's folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a file's name")
    asked = parser.parse_args()
    files = [file for file in sorted(asked.folder.glob("*.jinja")) if asked.only in file.name]
    one = partial(prove, tokenizer=load_tokenizer(asked.tokenizer), count=asked.conversations)
    with ProcessPoolExecutor(asked.workers) as pool:
        results = []
        for result in pool.map(one, files):
            print(result, flush=True)
            results.append(result)
    wrong = sum(len(result.wrong) for result in results)
    print(
        f"{len(results):,} templates, {sum(bool(result.refused) for result in results):,} refused; "
        f"{sum(result.proved for result in results):,} conversations proved, "
        f"{sum(sum(result.refusals.values()) for result in results):,} refused, {wrong:,} wrong"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
