"""The verb rank: a file of four lines becomes a record of ranked answers, and a second session asks nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from llmtrainer.apps.rank import Rank, rank
from llmtrainer.base.errors import UserError


def answered(monkeypatch: pytest.MonkeyPatch, *replies: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{reply}\n" for reply in replies)))


def test_four_lines_become_a_rank_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\n\nthree\nfour\n")
    settings = Rank(source=str(lines), out=str(tmp_path / "ranked.jsonl"), prompt="Count.")
    answered(monkeypatch, "first the third", "3 1 4 2")
    made = rank(settings)
    assert (made.ranked, made.left) == (1, 0)
    assert json.loads((tmp_path / "ranked.jsonl").read_text()) == {
        "prompt": "Count.", "answers": ["three", "one", "four", "two"],
    }
    shown = capsys.readouterr()
    assert shown.out == "" and "(3) three" in shown.err and "from the best to the worst, such as 1 2 3 4" in shown.err
    answered(monkeypatch)
    assert (rank(settings).ranked, rank(settings).left) == (0, 0)


def test_a_session_that_stops_keeps_what_it_has_and_names_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "answers.jsonl", tmp_path / "ranked.jsonl"
    source.write_text("".join(json.dumps({"q": f"p{n}", "a": ["x", f"y{n}"]}) + "\n" for n in range(4)))
    settings = Rank(source=str(source), out=str(out), question="q", answers="a")
    answered(monkeypatch, "21", "s", "q")
    assert (rank(settings).ranked, len(out.read_text().splitlines())) == (1, 1)
    answered(monkeypatch, "12", "12", "12")
    assert (rank(settings).left, len(out.read_text().splitlines())) == (0, 4)


@pytest.mark.parametrize(("record", "told"), [
    ({"prompt": "p"}, "no `prompt` with a list of `answers`"), ({"prompt": "p", "answers": ["a"]}, "only one answer"),
    (["a", "b"], "no `prompt`"),
])
def test_a_record_that_cannot_be_ranked_is_named(tmp_path: Path, record: object, told: str) -> None:
    source = tmp_path / "answers.jsonl"
    source.write_text(json.dumps({"prompt": "p", "answers": ["a", "b"]}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError, match=told) as refused:
        rank(Rank(source=str(source), out=str(tmp_path / "ranked.jsonl")))
    assert refused.value.where is not None and "record 2" in refused.value.where


def test_lines_that_are_no_groups_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(UserError, match="3 lines are no groups of 4"):
        rank(Rank(source=str(tmp_path / "lines.txt"), out=str(tmp_path / "ranked.jsonl")))
