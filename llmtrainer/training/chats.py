"""Chat templates as the other parts want them: made by any process, and written beside a model."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import load_tokenizer

GENERATION_FILE = "generation_config.json"


def load_chat(folder: Path, template: str, day: str | None, leave_out: tuple[str, ...]) -> Chat:
    """The template of a tokenizer's folder. A function of its own, so that other processes can import it."""
    return Chat(load_tokenizer(folder), template, day=day_of(day), leave_out=leave_out)


def day_of(text: str | None) -> date | None:
    """The date that a setting names."""
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise UserError(f"`{text}` is no date", fix=f"date={date.today().isoformat()}") from None


def generation_config(chat: Chat) -> str:
    """generation_config.json of a model that answers: where its answers stop, besides the tokenizer's own end."""
    tokenizer = chat.tokenizer
    ends = list(dict.fromkeys([*chat.end_ids, tokenizer.end]))
    settings: dict[str, int | list[int]] = {} if tokenizer.begin is None else {"bos_token_id": tokenizer.begin}
    settings |= {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": tokenizer.pad}
    return json.dumps(settings, indent=2) + "\n"
