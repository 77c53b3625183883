"""A prompt and two answers to it, all texts."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.compared import MARGINS, NAMES, answer_of, better_key, margin_of, prompt_of
from llmtrainer.data.format import BESIDE, ComparisonFormat, identity, is_texts, mapping, needed, others, text, tools


class Texts(ComparisonFormat):
    """`{"prompt", "chosen", "rejected"}` or `{"prompt", "selected", "rejected"}`, all texts, with `margin`, or
    `score_chosen` and `score_rejected`, where there are any. They are joined as they stand, as a base model reads
    them; with `as_messages`, or a `system` or `tools` in the record, they are a user's message and two of the
    assistant."""

    prompt: str = "prompt"
    """The key of what is read."""

    better: str | None = None
    """The key of the better answer. Left out: `chosen`, or `selected`."""

    worse: str = "rejected"
    """The key of the worse answer."""

    as_messages: bool = False
    """Whether the chat template stands around prompt and answers."""

    sample: ClassVar[tuple[Any, Comparison]] = (
        {"prompt": "2 + 3 = ", "chosen": "5", "rejected": "6", "margin": 2},
        Comparison(
            (Message("user", "2 + 3 = "),), ((Message("assistant", "5"),), (Message("assistant", "6"),)), margin=2.0,
            plain=True,
        ),
    )

    def matches(self, record: object) -> bool:
        return is_texts(record, self.prompt, better_key(record, self.better), self.worse)

    def example(self, record: object) -> Comparison:
        whole = mapping(record)
        better = better_key(whole, self.better)
        asked = text(needed(whole, self.prompt), self.prompt)
        prompt, plain = prompt_of(asked, self.prompt, whole, as_messages=self.as_messages)
        answers = tuple(answer_of(text(needed(whole, key), key), key) for key in (better, self.worse))
        return Comparison(
            prompt, answers, margin=margin_of(whole), tools=tools(whole), plain=plain, name=identity(whole, *NAMES),
            facts=others(whole, self.prompt, better, self.worse, *BESIDE, *MARGINS, *NAMES),
        )
