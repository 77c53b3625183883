"""Putting answers in order: what a reply means, what is kept, what is asked again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.core.ranking import Question, Ranking, append, grade, order, read

VERSE = Question("Write a verse.", ("a", "bb", "ccc", "dddd"))
SUM = Question([{"role": "user", "content": "2 + 3"}], ("5", "6"))


@pytest.mark.parametrize("reply", ["2 1 4 3", "2>1>4>3", "2143", " 2, 1, 4, 3 \n", "2 > 1 > 4 > 3", "2;1;4;3"])
def test_an_order_may_be_written_in_several_ways(reply: str) -> None:
    assert order(reply, 4) == [1, 0, 3, 2]


def test_from_ten_answers_on_numbers_stand_apart_and_some_may_be_left_out() -> None:
    assert order("10 2", 12) == [9, 1] and order("3 1", 4) == [2, 0]


@pytest.mark.parametrize(("reply", "told"), [
    ("", "write"), ("good", "write"), ("0 1", "no answer 0"), ("1 5", "no answer 5"), ("1 1", "twice"),
    ("2", "at least"), ("-1 2", "write"), ("1=2", "write"),
])
def test_a_reply_that_is_no_order_is_told_why(reply: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        order(reply, 4)


@pytest.mark.parametrize("reply", ["x", "", "3", "-2.1", "nan", "inf"])
def test_a_grade_outside_its_range_is_none(reply: str) -> None:
    with pytest.raises(ValueError):
        grade(reply, -2, 2)
    assert grade(" -1.5\n", -2, 2) == -1.5


def test_a_session_goes_on_where_another_stopped(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ranked.jsonl"
    first = Ranking([VERSE, SUM], path)
    assert first.waiting == VERSE and first.left == 2
    assert first.place([1, 0, 3, 2]) == {"prompt": "Write a verse.", "answers": ["bb", "a", "dddd", "ccc"]}
    assert first.waiting == SUM
    second = Ranking([SUM, VERSE], path)
    assert second.waiting == SUM and second.left == 1
    second.skip()
    assert second.waiting is None and Ranking([VERSE, SUM], path).waiting == SUM
    assert [json.loads(line)["answers"] for line in path.read_text().splitlines()] == [["bb", "a", "dddd", "ccc"]]


def test_an_answer_that_was_left_out_is_kept_and_the_question_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "ranked.jsonl"
    assert Ranking([VERSE], path).place([2, 0])["left_out"] == ["bb", "dddd"]
    assert Ranking([VERSE], path).left == 0


def test_the_same_question_twice_is_asked_twice(tmp_path: Path) -> None:
    path = tmp_path / "ranked.jsonl"
    ranking = Ranking([SUM, SUM], path)
    ranking.place([0, 1])
    assert Ranking([SUM, SUM], path).left == 1


def test_a_line_that_a_crash_cut_is_asked_again_and_its_rest_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "ranked.jsonl"
    Ranking([VERSE, SUM], path).place([0, 1, 2, 3])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"prompt": [{"ro')
    ranking = Ranking([VERSE, SUM], path)
    assert ranking.waiting == SUM
    ranking.place([1, 0])
    assert len(read(path)) == 2 and path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 2


def test_a_line_that_a_crash_cut_inside_a_character_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "ranked.jsonl"
    record = {"prompt": "\u4f60\u597d", "grade": 1}
    append(path, record)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: whole.index("\u597d".encode()) + 1])
    assert read(path) == [record]


def test_a_file_of_something_else_is_never_added_to(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\nworld\n")
    with pytest.raises(UserError, match="something else"):
        Ranking([SUM], path)
    assert path.read_text() == "hello\nworld\n"


def test_half_a_character_of_a_model_is_kept(tmp_path: Path) -> None:
    append(tmp_path / "a.jsonl", {"prompt": "\ud800", "answer": "\u4e2d"})
    assert read(tmp_path / "a.jsonl") == [{"prompt": "\ud800", "answer": "\u4e2d"}]
