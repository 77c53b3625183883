"""A prompt and the answer behind it, where a template never shows the two in one text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from llmtrainer.core.example import Message
from llmtrainer.tokenizer.rendered import Control, Rendered, behind_common

_EMPTY_BLOCK = re.compile(r"\s*<(\|?)(\w+)>\w*\s*</?\2\1>\s*")
"""`<think>`, blanks, `</think>`; or `<|channel>thought`, a line's end, `<channel|>`."""
_OPEN_BLOCK = re.compile(r"<(think|thinking|reasoning)>\s*")


def own_of(prompt: str, call: str, alone: Rendered, message: Message, place: int) -> tuple[int, str] | None:
    """Where a message's own text begins in the conversation up to it, and what goes between it and the prompt for it.

    For templates whose prompt says more than the conversation repeats once it is answered: blanks; an empty block of
    reasoning, if the message has none; the beginning of a block of reasoning, which is filled with the message's and
    closed as the models that open it were taught: a line's end, the closing tag, an empty line (arXiv:2501.12948).
    Or earlier reasoning, up to the answer that follows it: then what counts is the template's call for an answer
    (`call`), right before the message's text in both. None where the template shows otherwise, or it cannot be told
    what the model would write behind the prompt.
    """
    first = min(alone.of_message(place), default=len(alone.text))
    start = min(len(prompt) - len(behind_common(prompt, alone.text)), first)
    start = next((item.start for item in alone.controls if item.start < start < item.stop), start)
    more = prompt[start:]
    written = (place, "thinking") in alone.read.places
    if not more.strip() or (_EMPTY_BLOCK.fullmatch(more) and not written):
        return start, ""
    opened = _OPEN_BLOCK.fullmatch(more)
    thinking = (message.thinking or "").strip()
    if opened is not None and thinking and not written:
        return start, f"{thinking}\n</{opened[1]}>\n\n"
    called = alone.text.rfind(call, 0, first)
    if opened is not None or not call.strip() or called < 0 or not alone.of_message(place):
        return None
    return called + len(call), ""


def opens_reasoning(text: str) -> bool:
    """Whether a text is the beginning of a block of reasoning."""
    return _OPEN_BLOCK.fullmatch(text) is not None


def joined(
    prompt: Rendered, between: str, alone: Rendered, start: int, names: Mapping[str, int]
) -> Rendered:
    """A prompt, reasoning with its closing tag or nothing, and what stands from `start` on in another text. No message
    of it can be found by its marks. names: the tokenizer's control tokens."""
    text = prompt.text + between
    controls = list(prompt.controls)
    closing = between.strip().rpartition("\n")[2]
    if closing in names:
        place = len(prompt.text) + between.rindex(closing)
        controls.append(Control(place, place + len(closing), names[closing]))
    shift = len(text) - start
    controls += [
        replace(item, start=item.start + shift, stop=item.stop + shift)
        for item in alone.controls if item.start >= start
    ]
    return Rendered(text + alone.text[start:], replace(prompt.read, places={}), tuple(controls))


def closed(rendered: Rendered, name: str, token: int) -> Rendered:
    """The same text with a control token behind it: where a turn ends only by the name that begins the next one."""
    start, stop = len(rendered.text), len(rendered.text) + len(name)
    return replace(rendered, text=rendered.text + name, controls=(*rendered.controls, Control(start, stop, token)))


def is_alone(alone: Rendered, place: int, start: int) -> bool:
    """Whether all of the message's marks stand behind a place, and no other message's do."""
    return all(
        (mark >= start) == (owner == place) for (owner, _), where in alone.read.places.items() for mark in where
    )
