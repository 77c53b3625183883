"""A template of bytes and small files of conversations, for tests of how they become a store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.core.example import Example, TokenRow
from llmtrainer.data.document import SourceFile
from llmtrainer.data.examples import ExampleFile
from llmtrainer.data.formats.messages import Messages
from tests.data.worlds import END


class ByteChat:
    """`user:text END` for each message; an assistant's text and its END are learned."""

    fingerprint = "bytes, no other template"
    end_ids = (END,)

    def rows(self, example: Example) -> tuple[TokenRow, ...]:
        tokens: list[int] = []
        weights: list[float] = []
        for message in example.messages:
            if "refuse me" in message.content:
                raise UserError("the template refuses this", where="the template")
            head, said = list(f"{message.role}:".encode()), [*message.content.encode(), END]
            learned = 1.0 if message.role == "assistant" else 0.0
            weight = learned if message.weight is None else message.weight
            tokens += head + said
            weights += [0.0] * len(head) + [weight] * len(said)
        return (TokenRow(tuple(tokens), tuple(weights)),)


def make_chat() -> ByteChat:
    return ByteChat()


def dialogue(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def write_lines(path: Path, records: Sequence[Any]) -> SourceFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return SourceFile(path, path.stat().st_size)


def chat_file(path: Path, records: Sequence[Any]) -> ExampleFile:
    return ExampleFile(write_lines(path, records), Messages())
