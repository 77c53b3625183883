"""Prompt and answers as ids that another program made."""

from __future__ import annotations

from typing import Any, ClassVar

from llmtrainer.core.example import Comparison
from llmtrainer.data.compared import MARGINS, NAMES, margin_of
from llmtrainer.data.format import ComparisonFormat, identity, items, mapping, needed, others, refused, require_plain

_ENDINGS = ("", "_ids", "_input_ids")


class Ids(ComparisonFormat):
    """`{"chosen", "rejected"}` as lists of token ids, with the ids of the prompt under `prompt`, which the answers
    follow; without it, what both begin with is the prompt. `chosen_ids` or `chosen_input_ids` are names too. The ids
    are taken as they are: an answer that is to teach the model to stop ends with its end token."""

    sample: ClassVar[tuple[Any, Comparison]] = (
        {"prompt": [5, 6], "chosen": [7, 2], "rejected": [8, 9, 2]},
        Comparison((), (), ids=((5, 6), (7, 2), (8, 9, 2)), plain=True),
    )

    def matches(self, record: object) -> bool:
        if not isinstance(record, dict):
            return False
        return all(_are_ids(record.get(_name(record, key))) for key in ("chosen", "rejected"))

    def example(self, record: object) -> Comparison:
        whole = mapping(record)
        require_plain(whole, "a list of token ids")
        keys = [_name(whole, key) for key in ("prompt", "chosen", "rejected")]
        chosen, rejected = (_ids(needed(whole, key), key) for key in keys[1:])
        prompt: tuple[int, ...] = ()
        if keys[0] in whole:
            prompt = _ids(whole[keys[0]], keys[0])
        else:
            alike = 0
            while alike < min(len(chosen), len(rejected)) - 1 and chosen[alike] == rejected[alike]:
                alike += 1
            prompt, chosen, rejected = chosen[:alike], chosen[alike:], rejected[alike:]
        return Comparison(
            (), (), margin=margin_of(whole), ids=(prompt, chosen, rejected), plain=True, name=identity(whole, *NAMES),
            facts=others(whole, *keys, *MARGINS, *NAMES),
        )


def _name(record: Any, key: str) -> str:
    return next((key + ending for ending in _ENDINGS if key + ending in record), key)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _ids(value: object, path: str) -> tuple[int, ...]:
    for place, item in enumerate(items(value, path)):
        if type(item) is not int or item < 0:
            refused(f"`{path}.{place}` is {item!r} where a token id is wanted", f"{path}.{place}")
    return tuple(items(value, path))
