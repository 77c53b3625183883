"""Several answers to one prompt, in the order of how good they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.compared import NAMES, Turns, answer_of, number, prompt_of
from llmtrainer.data.format import BESIDE, ComparisonFormat, are_turns, identity, items, mapping, others, refused, tools

ANSWERS = ("answers", "responses", "completions")
_TEXTS = ("text", "answer", "response", "completion", "content")
_SCORES = ("score", "rating", "overall_score", "reward")
_SCORES_BESIDE = ("scores", "score", "ratings", "rewards")
_RANKS = ("ranks", "rank")
"""Names of lists beside the answers; `rank` is one inside an answer, too. The best answer has the lowest."""


class Ranked(ComparisonFormat):
    """`{"prompt", "answers": [the best, the next, ...]}`, texts or messages; `{"answers": [{"text", "score"}, ...]}` in
    any order, or `scores` beside them, of which the highest is the best (`rank` and `ranks`: the lowest); or a list of
    texts without a prompt. Of answers with the same score the first counts. `responses` and `completions` are names for
    `answers` too."""

    prompt: str = "prompt"
    """The key of the prompt, a text or messages. A record may have none."""

    answers: str | None = None
    """The key of the list. Left out: answers, responses or completions."""

    as_messages: bool = False
    """Whether the chat template stands around a prompt and answers that are texts."""

    sample: ClassVar[tuple[Any, Comparison]] = (
        {"prompt": "2 + 3 = ", "answers": [{"text": "6", "score": 1}, {"text": "5", "score": 3}]},
        Comparison(
            (Message("user", "2 + 3 = "),), ((Message("assistant", "5"),), (Message("assistant", "6"),)),
            scores=(3.0, 1.0), plain=True,
        ),
    )  # fmt: skip

    def matches(self, record: object) -> bool:
        if isinstance(record, list):
            return len(record) >= 2 and all(isinstance(item, str) for item in record)
        found = record.get(self._key(record)) if isinstance(record, dict) else None
        return isinstance(found, list) and len(found) >= 2 and all(
            isinstance(item, str) or are_turns(item) or (isinstance(item, Mapping) and _text_key(item) is not None)
            for item in found
        )

    def example(self, record: object) -> Comparison:
        whole = {"answers": record} if isinstance(record, list) else mapping(record)
        key = self._key(whole)
        if key not in whole:
            refused(
                f"a record has no `{key}`", key,
                f"it has: {', '.join(f'`{name}`' for name in list(whole)[:12]) or 'nothing'}",
                "mend the record, or name the format that the file has (in a recipe data.format)",
            )
        found = items(whole[key], key)
        if len(found) < 2:
            refused(f"`{key}` has {len(found)} answers", key, "two at least are compared")
        answers = [_answer(item, f"{key}.{place}") for place, item in enumerate(found)]
        scores = _figures(whole, found, key, _SCORES_BESIDE, _SCORES)
        if by := [-score for score in scores] or _figures(whole, found, key, _RANKS, ("rank",)):
            order = sorted(range(len(answers)), key=lambda place: by[place])
            answers, scores = [answers[place] for place in order], [scores[place] for place in order] if scores else []
        told = whole.get(self.prompt)
        texts = not any(are_turns(item) for item in found)
        prompt, plain = prompt_of(
            "" if told is None else told, self.prompt, whole, as_messages=self.as_messages or not texts
        )
        if told is None and not plain:
            refused(f"a record has no `{self.prompt}`", self.prompt, "messages answer something")
        return Comparison(
            prompt, tuple(answers), scores=tuple(scores), tools=tools(whole), plain=plain, name=identity(whole, *NAMES),
            facts=others(whole, key, self.prompt, *_SCORES_BESIDE, *_RANKS, *BESIDE, *NAMES),
        )

    def _key(self, record: Mapping[str, Any]) -> str:
        return self.answers or next((name for name in ANSWERS if name in record), ANSWERS[0])


def _text_key(item: Mapping[str, Any]) -> str | None:
    return next((name for name in _TEXTS if isinstance(item.get(name), str)), None)


def _answer(item: object, path: str) -> Turns:
    if isinstance(item, Mapping) and not are_turns(item) and (name := _text_key(item)) is not None:
        return answer_of(item[name], f"{path}.{name}")
    if isinstance(item, Mapping) and not are_turns(item):
        refused("an answer has no text", f"{path}.{_TEXTS[0]}", f"it has: {', '.join(f'`{name}`' for name in item)}")
    return answer_of(item, path)


def _figures(
    record: Mapping[str, Any], found: Any, key: str, beside: tuple[str, ...], inside: tuple[str, ...]
) -> list[float]:
    """A number for each answer, from a list beside them or inside each, as given; empty where nobody says."""
    if (name := next((name for name in beside if record.get(name) is not None), None)) is not None:
        told = items(record[name], name)
        if len(told) != len(found):
            refused(f"there are {len(told)} {name} for {len(found)} answers", name)
        return [number(item, f"{name}.{place}") for place, item in enumerate(told)]
    names = [next((name for name in inside if isinstance(item, Mapping) and name in item), None) for item in found]
    usual = next((name for name in names if name is not None), None)
    if usual is None:
        return []
    scores = []
    for place, (item, name) in enumerate(zip(found, names, strict=True)):
        if name is None:
            refused(f"an answer has no {usual}, and others have", f"{key}.{place}.{usual}")
        scores.append(number(item[name], f"{key}.{place}.{name}"))
    return scores
