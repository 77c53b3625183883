"""The proof of published templates: what it lets through, and what it must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrainer.tokenizer.tokenizer import FileTokenizer
from tests.tokenizer.published import prove

MARKED = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{% else %}{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_template_that_marks_its_answers_is_proved_against_transformers(
    trained: FileTokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "marked.jinja"
    file.write_text(MARKED)
    found = prove(file, trained, 30)
    assert (found.proved, found.compared, found.wrong, found.refused) == (30, 30, [], "")
    assert found.ends == ("<|im_end|>",) and found.takes.system


def test_marks_that_leave_out_the_end_are_told_apart(trained: FileTokenizer, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "open.jinja"
    file.write_text(MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"))
    found = prove(file, trained, 10)
    assert found.wrong and "learned and not all of it marked" in found.wrong[0]
