"""Comparisons under the keys that files have for them, and what is said where one is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Comparison, Message
from llmtrainer.data.comparisons.auto import Auto
from llmtrainer.data.comparisons.conversations import Conversations
from llmtrainer.data.comparisons.graded import Graded
from llmtrainer.data.comparisons.human_assistant import HumanAssistant
from llmtrainer.data.comparisons.ids import Ids
from llmtrainer.data.comparisons.instruction import Instruction
from llmtrainer.data.comparisons.liked import Liked
from llmtrainer.data.comparisons.messages import Messages
from llmtrainer.data.comparisons.ranked import Ranked
from llmtrainer.data.comparisons.segments import Segments
from llmtrainer.data.comparisons.texts import Texts
from llmtrainer.data.detect import detect
from llmtrainer.data.document import Reading, SourceFile
from llmtrainer.data.format import ComparisonFormat
from llmtrainer.data.records import records

ASK, BE_SHORT = Message("user", "2 + 3?"), Message("system", "Be short.")
FIVE, SIX = (Message("assistant", "5"),), (Message("assistant", "6"),)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def turn(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


ASKED, ANSWERED = said("user", "2 + 3?"), said("assistant", "5")
WRONG = said("assistant", "6")


@pytest.mark.parametrize(
    ("format", "record", "wanted"),
    [
        (Texts(), {"prompt": "2 + 3?", "selected": "5", "rejected": "6"}, Comparison((ASK,), (FIVE, SIX), plain=True)),
        (
            Texts(), {"system": "Be short.", "prompt": "2 + 3?", "chosen": "5", "rejected": "6"},
            Comparison((BE_SHORT, ASK), (FIVE, SIX)),
        ),
        (
            Texts(as_messages=True), {"prompt": "2 + 3?", "chosen": "5", "rejected": "6", "id": 4, "source": "me"},
            Comparison((ASK,), (FIVE, SIX), name="4", facts={"source": "me"}),
        ),
        (
            Texts(prompt="q", better="a", worse="b"), {"q": "2 + 3?", "a": "5", "b": "6", "score_chosen": 4.5,
                                                        "score_rejected": 1},
            Comparison((ASK,), (FIVE, SIX), margin=3.5, plain=True),
        ),
        (
            Conversations(),
            {"conversations": [turn("system", "Be short."), turn("human", "2 + 3?")], "chosen": "5",
             "rejected": [turn("gpt", "6")]},
            Comparison((BE_SHORT, ASK), (FIVE, SIX)),
        ),
        (
            Conversations(skip_system=True),
            {"system": "Be short.", "conversations": [turn("human", "2 + 3?")], "chosen": turn("gpt", "5"),
             "rejected": turn("gpt", "6")},
            Comparison((ASK,), (FIVE, SIX)),
        ),
        (
            Messages(), {"prompt": "2 + 3?", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, WRONG]},
            Comparison((ASK,), (FIVE, SIX)),
        ),
        (
            Messages(), {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [WRONG]},
            Comparison((ASK,), (FIVE, SIX)),
        ),
        (
            Messages(), {"prompt": [ASKED], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, WRONG]},
            Comparison((ASK,), (FIVE, SIX)),
        ),
        (Messages(), {"prompt": "2 + 3?", "chosen": ANSWERED, "rejected": WRONG}, Comparison((ASK,), (FIVE, SIX))),
        (
            # Both sides say the same: the prompt still ends before an answer, and what is equal is dropped later.
            Messages(), {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]},
            Comparison((ASK,), (FIVE, FIVE)),
        ),
        (
            HumanAssistant(),
            {"chosen": "\n\nHuman: 2 + 3?\n\nAssistant: 5", "rejected": "\n\nHuman: 2 + 3?\n\nAssistant: 6"},
            Comparison((ASK,), (FIVE, SIX)),
        ),
        (
            HumanAssistant(),
            {"chosen": "Human: a\n\nAssistant: b\n\nHuman: 2 + 3?\n\nAssistant: 5\n\nor so",
             "rejected": "Human: a\n\nAssistant: b\n\nHuman: 2 + 3?\n\nAssistant:"},
            Comparison(
                (Message("user", "a"), Message("assistant", "b"), ASK),
                ((Message("assistant", "5\n\nor so"),), (Message("assistant", ""),)),
            ),
        ),
        (
            Ids(), {"chosen": [1, 2, 3], "rejected": [1, 2, 4, 5]},
            Comparison((), (), ids=((1, 2), (3,), (4, 5)), plain=True),
        ),
        (
            Ids(), {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 4]},
            Comparison((), (), ids=((1,), (2, 3), (2, 4)), plain=True),
        ),
        (Ranked(), ["5", "6"], Comparison((Message("user", ""),), (FIVE, SIX), plain=True)),
        (
            Ranked(), {"prompt": "2 + 3?", "responses": ["6", "5"], "scores": [1, 9]},
            Comparison((ASK,), (FIVE, SIX), scores=(9.0, 1.0), plain=True),
        ),
        (
            Ranked(), {"prompt": "2 + 3?", "answers": ["6", "5"], "score": [1, 9]},
            Comparison((ASK,), (FIVE, SIX), scores=(9.0, 1.0), plain=True),
        ),
        (
            Ranked(), {"prompt": "2 + 3?", "answers": ["6", "5"], "ranks": [2, 1]},
            Comparison((ASK,), (FIVE, SIX), plain=True),
        ),
        (
            Ranked(), {"prompt": "2 + 3?", "answers": [{"text": "6", "rank": 2}, {"text": "5", "rank": 1}]},
            Comparison((ASK,), (FIVE, SIX), plain=True),
        ),
        (
            Ranked(), {"prompt": [ASKED], "answers": [ANSWERED, [WRONG]]}, Comparison((ASK,), (FIVE, SIX)),
        ),
        (
            Liked(), {"messages": [ASKED, ANSWERED], "label": False}, Comparison((ASK,), (FIVE,), liked=False),
        ),
        (
            Liked(), {"conversations": [turn("human", "2 + 3?"), turn("gpt", "5")], "kto_tag": 1},
            Comparison((ASK,), (FIVE,), liked=True),
        ),
        (
            Liked(), {"prompt": [ASKED], "completion": [ANSWERED], "label": True},
            Comparison((ASK,), (FIVE,), liked=True),
        ),
        (
            Graded(lowest=1), {"messages": [ASKED, ANSWERED], "stars": "5"}, Comparison((ASK,), (FIVE,), grade=(4, 5)),
        ),
        (
            Graded(grade="quality"), {"prompt": "2 + 3?", "response": "5", "quality": [2, 4.0]},
            Comparison((ASK,), (FIVE,), grade=(2, 5), plain=True),
        ),
        (
            Graded(), {"text": "5", "rating": 0}, Comparison((Message("user", ""),), (FIVE,), grade=(0, 1), plain=True),
        ),
        (
            Segments(), {"prompt": [ASKED], "pairs": [{"selected": [ANSWERED], "rejected": WRONG}]},
            Comparison((ASK,), (FIVE, SIX), paired=True),
        ),
        (
            Segments(as_messages=True), {"prompt": "2 + 3?", "segments": [{"chosen": "5", "rejected": "6"}] * 2},
            Comparison((ASK,), (FIVE, SIX, FIVE, SIX), paired=True),
        ),
    ],
)  # fmt: skip
def test_a_comparison_is_read_under_all_the_keys_that_a_form_has(
    format: ComparisonFormat, record: Any, wanted: Comparison
) -> None:
    assert format.matches(record)
    assert format.example(record) == wanted


LOOK = {"type": "function", "function": {"name": "look"}}
DIALOGUES = {"chosen": "Human: 2 + 3?\n\nAssistant: 5", "rejected": "Human: 2 + 3?\n\nAssistant: 6"}
WITHOUT_SYSTEM: list[tuple[ComparisonFormat, dict[str, Any]]] = [
    (Texts(), {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}),
    (Conversations(), {"conversations": [turn("human", "2 + 3?")], "chosen": "5", "rejected": "6"}),
    (Messages(), {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [WRONG]}),
    (Messages(), {"prompt": [ASKED], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, WRONG]}),
    (Messages(), {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, WRONG]}),
    (Messages(), {"prompt": "2 + 3?", "chosen": ANSWERED, "rejected": WRONG}),
    (Ranked(), {"prompt": "2 + 3?", "answers": ["5", "6"]}),
    (Liked(), {"prompt": "2 + 3?", "completion": "5", "label": True}),
    (Liked(), {"messages": [ASKED, ANSWERED], "label": True}),
    (Graded(), {"prompt": "2 + 3?", "completion": "5", "grade": 1}),
    (Segments(), {"prompt": "2 + 3?", "segments": [{"chosen": "5", "rejected": "6"}]}),
    (HumanAssistant(), DIALOGUES),
    (Instruction(), {"instruction": "2 + 3?", "chosen": "5", "rejected": "6"}),
]


@pytest.mark.parametrize(("format", "record"), WITHOUT_SYSTEM)
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_what_stands_beside_a_comparison_belongs_to_it_in_every_form(
    format: ComparisonFormat, record: dict[str, Any], name: str
) -> None:
    found = format.example({**record, "system": "Be short.", name: [LOOK]})
    assert (found.prompt, found.tools, found.plain, found.facts) == ((BE_SHORT, ASK), (LOOK,), False, {})
    assert found.answers[0] == FIVE
    assert not format.example({**record, name: [LOOK]}).plain


@pytest.mark.parametrize(
    ("format", "record"),
    [
        (Conversations(), {"conversations": [turn("system", "a"), turn("human", "b")], "chosen": "5", "rejected": "6"}),
        (Messages(), {"prompt": [said("system", "a"), ASKED], "chosen": [ANSWERED], "rejected": [WRONG]}),
        (Messages(), {key: [said("system", "a"), ASKED, ANSWERED] for key in ("chosen", "rejected")}),
        (Liked(), {"messages": [said("system", "a"), ASKED, ANSWERED], "label": True}),
        (Ids(), {"chosen": [1, 2], "rejected": [1, 3]}),
        (Graded(), {"text": "5", "grade": 1}),
    ],
)  # fmt: skip
def test_a_system_text_that_has_no_place_or_another_beside_it_is_refused(
    format: ComparisonFormat, record: dict[str, Any]
) -> None:
    format.example(record)
    with pytest.raises(UserError) as error:
        format.example({**record, "system": "Be short."})
    assert error.value.where == "key `system`"


@pytest.mark.parametrize(
    ("format", "record", "key"),
    [
        (Texts(), {"prompt": "a", "chosen": "b"}, "rejected"), (Texts(), {"prompt": "a", "rejected": "b"}, "chosen"),
        (Texts(), {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"}, "margin"),
        (Conversations(), {"conversations": [turn("gpt", "a")], "chosen": "b", "rejected": "c"}, "conversations"),
        (
            Conversations(),
            {"conversations": [turn("human", "a"), turn("gpt", "b")], "chosen": "b", "rejected": "c"}, "conversations",
        ),
        (Conversations(), {"conversations": [turn("human", "a")], "chosen": 5, "rejected": "c"}, "chosen"),
        (
            Conversations(), {"conversations": [turn("human", "a")], "chosen": turn("human", "b"), "rejected": "c"},
            "chosen",
        ),
        (Messages(), {"chosen": [ANSWERED], "rejected": [WRONG]}, "chosen"),
        (Messages(), {"prompt": [ASKED], "chosen": [ASKED, ANSWERED], "rejected": [WRONG]}, "prompt"),
        (Ranked(), {"prompt": "a", "answers": ["b", "c"], "ranks": [1]}, "ranks"),
        (Messages(), {"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, "rejected"),
        (HumanAssistant(), {"chosen": "Human: a", "rejected": "Human: a\n\nAssistant: b"}, "chosen"),
        (HumanAssistant(), {"chosen": "Hello", "rejected": "Human: a\n\nAssistant: b"}, "chosen"),
        (Ids(), {"chosen": [1, 2], "rejected": [1, "2"]}, "rejected.1"),
        (Ranked(), {"prompt": "a", "answers": ["b"]}, "answers"),
        (Ranked(), {"prompt": "a", "answers": ["b", "c"], "scores": [1]}, "scores"),
        (Ranked(), {"answers": [ANSWERED, WRONG]}, "prompt"),
        (Liked(), {"prompt": "a", "completion": "b", "label": 2}, "label"),
        (Liked(), {"messages": [ASKED], "label": True}, "messages"),
        (Graded(), {"text": "a", "grade": 1.5}, "grade"), (Graded(), {"text": "a", "grade": True}, "grade"),
        (Graded(), {"text": "a", "grade": [3, 2]}, "grade"), (Graded(lowest=1), {"text": "a", "grade": 0}, "grade"),
        (Graded(), {"text": " ", "grade": 1}, "text"), (Graded(), {"prompt": "a", "grade": 1}, "completion"),
        (Segments(), {"prompt": "a", "segments": []}, "segments"),
        (Segments(), {"prompt": "a", "segments": [{"chosen": "b"}]}, "segments.0.rejected"),
        (Segments(), {"segments": [{"chosen": "b", "rejected": "c"}]}, "prompt"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_record_is_named_by_its_key(format: ComparisonFormat, record: Any, key: str) -> None:
    with pytest.raises(UserError) as error:
        format.example(record)
    assert error.value.where == f"key `{key}`"


def found_in(path: Path, *lines: Any) -> str:
    file = path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted: ComparisonFormat = Auto()
    told = detect(wanted, records(SourceFile(file, file.stat().st_size), Reading(whole=True)))
    assert told is not None
    return told.how


def test_what_a_file_is_found_to_be_is_said_with_its_first_comparison(tmp_path: Path) -> None:
    told = found_in(tmp_path, {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"})
    assert told.splitlines()[0].startswith("format texts (known by `prompt`, `chosen`, `rejected`)")
    assert told.splitlines()[1:] == [
        "  without a template: what is read, then each answer", "  user: 2 + 3?", "  -- answer 1, the best",
        "  assistant: 5", "  -- answer 2, the next", "  assistant: 6",
    ]  # fmt: skip
    told = found_in(tmp_path, {"prompt": "a", "answers": [{"text": "b", "score": 1}, {"text": "c", "score": 2.5}]})
    assert "-- answer 1, score 2.5\n  assistant: c" in told
    assert "-- graded class 2 to 3\n" in found_in(tmp_path, {"prompt": "a", "completion": "b", "grade": [2, 3]})
    told = found_in(tmp_path, {"prompt": "a", "segments": [{"chosen": "b", "rejected": "c"}] * 2})
    assert "-- pair 1, the better\n  assistant: b" in told and "-- pair 2, the worse\n  assistant: c" in told
    assert "-- not liked" in found_in(tmp_path, {"messages": [ASKED, ANSWERED], "label": False})
    assert "2 tokens of the prompt" in found_in(tmp_path, {"chosen": [1, 2, 3], "rejected": [1, 2, 4]})


def test_a_file_that_is_no_comparison_asks_for_a_format_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no format fits") as error:
        found_in(tmp_path, {"question": "a", "answer": "b"})
    assert error.value.fix is not None and "human_assistant" in error.value.fix
