"""A comparison becomes rows with one prompt, cut as documented, equal answers dropped, and every record has a fate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import GROUP
from llmtrainer.core.example import Example, TokenRow
from llmtrainer.core.objective import count
from llmtrainer.data.comparison_rows import EQUAL, ComparisonChoices
from llmtrainer.data.comparison_source import ComparisonSource, ComparisonTable
from llmtrainer.data.comparisons.graded import Graded
from llmtrainer.data.comparisons.ids import Ids
from llmtrainer.data.comparisons.liked import Liked
from llmtrainer.data.comparisons.ranked import Ranked
from llmtrainer.data.comparisons.segments import Segments
from llmtrainer.data.comparisons.texts import Texts
from llmtrainer.data.document import SourceFile
from llmtrainer.data.examples import ExampleFile, fates_of, write_examples
from llmtrainer.data.format import ComparisonFormat
from llmtrainer.data.packed import GRADES, Store
from tests.data.worlds import END, ByteTokenizer


class Joined:
    """Bytes end to end and an end behind them; a prompt that says `twice` is shown in two rows."""

    fingerprint = "joined"
    end_ids: Sequence[int] = (END,)

    def rows(self, example: Example) -> list[TokenRow]:
        prompt = "".join(message.content for message in example.messages if message.weight == 0.0)
        answer = "".join(message.content for message in example.messages if message.weight != 0.0)
        ids = [*prompt.encode(), *answer.encode(), END]
        weights = [0.0] * len(prompt) + [1.0] * (len(answer) + 1)
        return [TokenRow(tuple(ids), tuple(weights))] * (2 if "twice" in prompt else 1)


def store_of(
    path: Path, lines: Sequence[Any], format: ComparisonFormat | None = None, *, dropped: float = 1.0,
    name: str = "store", workers: int = 0, **choices: Any,
) -> Store:  # fmt: skip
    file = path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, Any] = {"longest": 100, **choices}
    return write_examples(
        [ExampleFile(SourceFile(file, file.stat().st_size), format or Texts())], Joined, ByteTokenizer(), path / name,
        choices=ComparisonChoices(**settings), max_dropped_share=dropped, shard_tokens=40, workers=workers,
    )  # fmt: skip


def texts(store: Store) -> list[str]:
    return ["".join(chr(token) if token != END else "$" for token in store.read(d)) for d in range(store.documents)]


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_a_pair_is_two_documents_behind_one_prompt_whose_answers_are_learned(tmp_path: Path) -> None:
    store = store_of(tmp_path, [pair("ask", "good", "bad"), pair("q", "g", "b")])
    assert texts(store) == ["askgood$", "askbad$", "qg$", "qb$"]
    weights = [store.weights(document) for document in range(4)]
    assert [[] if item is None else item.tolist() for item in weights] == [
        [0] * 3 + [1] * 5, [0] * 3 + [1] * 4, [0, 1, 1], [0, 1, 1],
    ]  # fmt: skip
    table = ComparisonTable(store)
    assert table.starts.tolist() == [0, 2, 4] and table.shared.tolist() == [3, 1]
    assert table.liked is None and table.margin is None and store.comparisons == 2


# By hand, of 10 tokens: prompt 8, answers of 4 and 2 with their ends. Half of 10 is 5.
@pytest.mark.parametrize(
    ("choices", "wanted", "fate"),
    [
        ({"prompt_cut": "keep_end"}, ["45678abc$", "45678d$"], "prompt cut"),
        ({"prompt_cut": "keep_start"}, ["12345abc$", "12345d$"], "prompt cut"),
        ({"prompt_cut": "keep_end", "max_prompt_length": 7}, ["2345678abc", "2345678d$"], "cut"),
        ({"prompt_cut": "keep_start", "max_prompt_length": 9}, ["12345678ab", "12345678d$"], "cut"),
        ({"prompt_cut": "keep_end", "max_prompt_length": 1}, ["8abc$", "8d$"], "prompt cut"),
    ],
)  # fmt: skip
def test_a_pair_that_is_too_long_has_its_prompt_cut_first_and_then_its_answers(
    tmp_path: Path, choices: dict[str, Any], wanted: list[str], fate: str
) -> None:
    store = store_of(tmp_path, [pair("12345678", "abc", "d")], longest=10, **choices)
    assert texts(store) == wanted
    table = ComparisonTable(store)
    assert all(text[: int(table.shared[0])] == wanted[0][: int(table.shared[0])] for text in texts(store))
    assert fates_of(store).by_fate == {"kept": 0, fate: 1}


def test_a_prompt_that_is_short_enough_stays_whole_and_the_answers_are_cut(tmp_path: Path) -> None:
    store = store_of(tmp_path, [pair("123", "abcdefghij", "d")], longest=10)
    assert texts(store) == ["123abcdefg", "123d$"]


def test_what_is_too_long_may_be_dropped_or_kept_instead(tmp_path: Path) -> None:
    lines = [pair("12345678", "abc", "d"), pair("1", "a", "b")]
    dropped = store_of(tmp_path, lines, longest=10, too_long="drop", name="dropped")
    assert texts(dropped) == ["1a$", "1b$"] and fates_of(dropped).by_fate == {"kept": 1, "too long": 1}
    kept = store_of(tmp_path, lines, longest=10, too_long="keep", name="kept")
    assert texts(kept)[0] == "12345678abc$" and fates_of(kept).by_fate == {"kept": 1, "kept (longer)": 1}


def test_equal_answers_are_dropped_and_counted_also_where_only_the_cut_made_them_equal(tmp_path: Path) -> None:
    lines = [pair("q", "same", "same"), pair("q", "a", "b"), pair("1234", "abcdefg", "abcdefh")]
    store = store_of(tmp_path, lines, longest=8)
    assert texts(store) == ["qa$", "qb$"]
    told = fates_of(store)
    assert told.by_fate == {"kept": 1, EQUAL: 2} and "line 1" in told.examples[EQUAL]
    with pytest.raises(UserError, match="2 of 3 records would be dropped"):
        store_of(tmp_path, lines, longest=8, name="strict", dropped=0.1)


def test_ranked_answers_stand_best_first_without_ties_and_their_difference_is_the_margin(tmp_path: Path) -> None:
    lines = [
        {"prompt": "q", "answers": ["a", "b", "c"]},
        {"prompt": "q", "answers": [{"text": "a", "score": 1}, {"text": "b", "score": 4}]},
        {"prompt": "q", "answers": ["a", "b", "c"], "scores": [2, 3, 3]},
        {"prompt": "q", "answers": ["a", "b"], "scores": [2, 2]},
    ]
    store = store_of(tmp_path, lines, Ranked())
    assert texts(store) == ["qa$", "qb$", "qc$", "qb$", "qa$", "qb$", "qa$"]
    table = ComparisonTable(store)
    assert table.answers.tolist() == [3, 2, 2]
    assert table.margin is not None and table.margin.tolist() == [0.0, 3.0, 1.0]
    assert fates_of(store).by_fate == {"kept": 2, "kept without ties": 1, EQUAL: 1}


def test_an_answer_with_a_label_is_a_comparison_of_its_own(tmp_path: Path) -> None:
    lines = [{"prompt": "q", "completion": text, "label": liked} for text, liked in (("a", True), ("b", False))]
    table = ComparisonTable(store_of(tmp_path, lines, Liked()))
    assert table.answers.tolist() == [1, 1] and table.liked is not None and table.liked.tolist() == [1, 0]


def test_ids_make_the_same_store_as_the_texts_they_were_made_of(tmp_path: Path) -> None:
    lines = [pair("ask", "good", "bad"), pair("12345678", "abc", "d")]
    tokenised = [
        {"prompt": list(line["prompt"].encode()), **{
            key: [*line[key].encode(), END] for key in ("chosen", "rejected")
        }} for line in lines
    ]  # fmt: skip
    online = store_of(tmp_path, lines, longest=10, name="online")
    ready = store_of(tmp_path, tokenised, Ids(), longest=10, name="ready")
    assert texts(online) == texts(ready)
    for name in ("starts", "shared"):
        np.testing.assert_array_equal(getattr(ComparisonTable(online), name), getattr(ComparisonTable(ready), name))


def test_every_record_has_a_fate_and_a_bad_one_stops_with_its_line_or_is_counted(tmp_path: Path) -> None:
    lines = [pair("q", "a", "b"), {"prompt": "q"}, pair("twice", "a", "b")]
    with pytest.raises(UserError, match="line 2, key `chosen`"):
        store_of(tmp_path, lines)
    with pytest.raises(UserError, match="would become 2 rows"):
        store_of(tmp_path, [lines[2]], name="twice")
    store = store_of(tmp_path, lines, bad_records="drop", name="dropping")
    assert fates_of(store).by_fate == {"kept": 1, "bad record": 2} and fates_of(store).records == 3


def test_two_processes_and_a_try_that_was_killed_give_the_bytes_of_one(tmp_path: Path) -> None:
    lines = [pair(f"q{number}", "a" * (1 + number % 7), "b", margin=number / 2) for number in range(300)]
    alone = store_of(tmp_path, lines, name="alone")
    assert alone.comparisons == 300
    assert ComparisonTable(alone).shared.sum() == sum(len(f"q{number}") for number in range(300))
    (tmp_path / "again").mkdir()
    seen = 0

    def stop(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > 128:
            raise KeyboardInterrupt

    file = tmp_path / "alone.jsonl"
    write = partial(
        write_examples, [ExampleFile(SourceFile(file, file.stat().st_size), Texts())], Joined, ByteTokenizer(),
        tmp_path / "again" / "store", choices=ComparisonChoices(100), max_dropped_share=1.0, shard_tokens=40,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        write(report=stop)
    again = write()
    assert again.fingerprint == alone.fingerprint


def test_the_fingerprint_knows_what_belongs_together_and_by_how_much(tmp_path: Path) -> None:
    def of(name: str, lines: list[Any], format: ComparisonFormat | None = None) -> str:
        return store_of(tmp_path, lines, format, name=name).fingerprint

    found = {
        of("a", [pair("q", "a", "b"), pair("q", "c", "d")]),
        of("b", [{"prompt": "q", "answers": list("abcd")}], Ranked()),
        of("c", [pair("q", "a", "b", margin=1), pair("q", "c", "d")]),
        of("d", [pair("q", "a", "b", margin=2), pair("q", "c", "d")]),
    }  # fmt: skip
    assert len(found) == 4


def test_grades_are_kept_beside_the_one_answer_that_has_them(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "completion": "b", "grade": 3}, {"text": "cd", "grade": [0, 2]}]
    store = store_of(tmp_path, lines, Graded())
    table = ComparisonTable(store)
    assert texts(store) == ["ab$", "cd$"] and store.holds(GRADES) and table.liked is None
    assert [table.read(number, 0).grade for number in range(2)] == [(3, 4), (0, 3)]
    assert table.shared.tolist() == [1, 0]


def test_pairs_of_segments_keep_their_order_and_only_those_that_differ(tmp_path: Path) -> None:
    def record(*pairs: str) -> dict[str, Any]:
        return {"prompt": "p", "segments": [{"chosen": two[0], "rejected": two[1]} for two in pairs]}

    # Segments of different pairs may be alike: each pair is compared within itself.
    store = store_of(tmp_path, [record("ab", "ac", "dd"), record("ee"), record("fg")], Segments())
    table, fates = ComparisonTable(store), fates_of(store)
    assert texts(store) == ["pa$", "pb$", "pa$", "pc$", "pf$", "pg$"]
    assert table.answers.tolist() == [4, 2] and table.read(0, 0).paired
    assert fates.by_fate == {"kept without ties": 1, EQUAL: 1, "kept": 1}
    (batch,) = ComparisonSource(store, pairs_per_step=2, tokens_per_batch=99, seed=0, shuffle=False).batches(0)
    assert batch.signals[GROUP].tolist() == [0, 0, 1, 1, 2, 2] and count([batch])["pairs"] == 3
    assert batch.document_BT.unique().tolist() == [0, 1, 2, 3, 4, 5]
