"""Wrong answers that a verifier must refuse and right ones that it must take (S20), kept beside this file."""

from __future__ import annotations

import pytest

from tests.confinement import require_confinement
from tests.rewards.corpora import KINDS, corpus, judged


@pytest.mark.parametrize("kind", KINDS)
def test_a_verifier_takes_every_right_answer_and_refuses_every_wrong_one(kind: str) -> None:
    if kind in ("maths", "code"):
        pytest.importorskip("math_verify", reason="the extra `maths` is not installed")
        require_confinement()
    found = judged(kind)
    assert len(found) == len(corpus(kind))
    # What could not be judged has no reward either, so it is as good as refused.
    wrong = [(row["text"], row["facts"], value) for row, value in found if (value == 1.0) != row["right"]]
    assert wrong == []
    assert {row["right"] for row, _ in found} == {True, False}
