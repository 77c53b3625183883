"""A reward model: one number for a whole text."""

from __future__ import annotations

from llmtrainer.core.protocols import Head


class Score(Head):
    """What a text is worth, read behind its last token, in place of the vocabulary's head. transformers loads such a
    model as AutoModelForSequenceClassification with one label."""
