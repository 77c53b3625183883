"""python -m llmtrainer."""

from __future__ import annotations

from llmtrainer.apps.cli import run

run()
