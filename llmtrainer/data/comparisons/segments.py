"""A prompt, and several pairs of a better and a worse answer to it, or to parts of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.compared import NAMES, answer_of, better_key, prompt_of
from llmtrainer.data.format import (
    BESIDE,
    ComparisonFormat,
    are_turns,
    identity,
    items,
    mapping,
    needed,
    others,
    refused,
    tools,
)

WORSE = "rejected"


class Segments(ComparisonFormat):
    """`{"prompt", "segments": [{"chosen", "rejected"}, ...]}`, texts or messages: each two are compared with each other
    and with nothing else that follows the prompt, which all of them share. `selected` is a name for `chosen`, `pairs`
    for `segments`."""

    prompt: str = "prompt"
    """The key of the prompt."""

    segments: str | None = None
    """The key of the pairs. Left out: segments or pairs."""

    as_messages: bool = False
    """Whether the chat template stands around a prompt and segments that are texts."""

    sample: ClassVar[tuple[Any, Comparison]] = (
        {
            "prompt": "2 + 3 = ",
            "segments": [{"chosen": "5", "rejected": "6"}, {"chosen": "five", "rejected": "six"}],
        },
        Comparison(
            (Message("user", "2 + 3 = "),), tuple((Message("assistant", said),) for said in ("5", "6", "five", "six")),
            paired=True, plain=True,
        ),
    )  # fmt: skip

    def matches(self, record: object) -> bool:
        found = record.get(self._key(record)) if isinstance(record, Mapping) else None
        return isinstance(found, list) and bool(found) and all(
            isinstance(item, Mapping) and all(_said(item.get(key)) for key in (better_key(item, None), WORSE))
            for item in found
        )

    def example(self, record: object) -> Comparison:
        whole = mapping(record)
        key = self._key(whole)
        answers, texts = [], True
        for place, item in enumerate(items(needed(whole, key), key)):
            here = f"{key}.{place}"
            pair = mapping(item, here)
            for side in (better_key(pair, None), WORSE):
                said = needed(pair, side, f"{here}.")
                answers.append(answer_of(said, f"{here}.{side}"))
                texts &= isinstance(said, str)
        if not answers:
            refused(f"`{key}` is empty", key, "one pair at least is compared")
        prompt, plain = prompt_of(
            needed(whole, self.prompt), self.prompt, whole, as_messages=self.as_messages or not texts
        )
        return Comparison(
            prompt, tuple(answers), paired=True, tools=tools(whole), plain=plain, name=identity(whole, *NAMES),
            facts=others(whole, key, self.prompt, *BESIDE, *NAMES),
        )

    def _key(self, record: Mapping[str, Any]) -> str:
        return self.segments or ("pairs" if "pairs" in record and "segments" not in record else "segments")


def _said(value: object) -> bool:
    return isinstance(value, str) or are_turns(value)
