"""Answers of our own making, each with whether a verifier must take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtrainer.core.example import Message
from llmtrainer.core.protocols import Reward
from llmtrainer.core.rollout import Answer

FOLDER = Path(__file__).parent / "corpora"
KINDS = sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def answer(text: str, finish: str = "end", tokens: int = 3, asked: str = "How many?", **facts: Any) -> Answer:
    return Answer((Message("user", asked),), text, tuple(range(tokens)), finish, facts)


def corpus(kind: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]


def judged(kind: str) -> list[tuple[dict[str, Any], float | None]]:
    """Every record of a corpus with what it earned; those of the same settings are judged together."""
    found = []
    rows = corpus(kind)
    groups = {json.dumps(row.get("settings", {}), sort_keys=True): row.get("settings", {}) for row in rows}
    for settings in groups.values():
        alike = [row for row in rows if row.get("settings", {}) == settings]
        reward = Reward.model_validate({"kind": kind, **settings})
        answers = [answer(row["text"], row.get("finish", "end"), **row["facts"]) for row in alike]
        found += zip(alike, reward.score(answers), strict=True)
    return found
