"""Every kind of evaluation reads every setting it has: one that it ignored would be a lie (S41)."""

from __future__ import annotations

import pytest

from llmtrainer.base.config import forget_reads, unread
from llmtrainer.base.kinds import kinds_in
from llmtrainer.core.suite import Suite
from llmtrainer.tokenizer.train import train_vocabulary
from tests.worlds import tiny_model

TEXT = "the quick brown fox jumps over the lazy dog, again and again"
SETTINGS: dict[str, dict[str, object]] = {
    "perplexity": {"name": "fox", "path": "somewhere", "max_length": 64, "tokens_per_batch": 128}
}
"""Something else than the default for every field of every kind."""


@pytest.mark.parametrize("kind", kinds_in("llmtrainer.evals"))
def test_a_suite_reads_every_setting_it_was_given(kind: str) -> None:
    suite = Suite.model_validate({"kind": kind, **SETTINGS[kind]})
    assert set(SETTINGS[kind]) == set(type(suite).model_fields), "a new field needs a line above"
    forget_reads(suite)
    policy = tiny_model().eval()
    figures = suite.run(policy, train_vocabulary(iter([TEXT]), 300), lambda path: [TEXT])
    assert figures and suite.title == SETTINGS[kind]["name"]
    assert unread(suite) == []
