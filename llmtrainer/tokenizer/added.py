"""More control tokens for a tokenizer: ids behind all others, which no text can become."""

from __future__ import annotations

import json
from collections.abc import Sequence

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer.files import CONFIG_FILE, FILE, MAP_FILE
from llmtrainer.tokenizer.tokenizer import FileTokenizer

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def with_tokens(tokenizer: FileTokenizer, names: Sequence[str]) -> FileTokenizer:
    """The same tokenizer with these control tokens too; those that it has already stay as they are.

    Ids of text do not change. UserError for a name that is a word of the vocabulary, or no name.
    """
    new = [name for name in dict.fromkeys(names) if name not in tokenizer.control]
    for name in new:
        _require_name(tokenizer, name)
    if not new:
        return tokenizer
    files = tokenizer.files()
    if FILE not in files:
        raise UserError(
            "this tokenizer takes no more tokens",
            why="a SentencePiece model that weighs words has its own file format",
            fix=f"save it with transformers once: AutoTokenizer.from_pretrained(...) writes {FILE}",
        )
    numbers = {name: tokenizer.vocabulary + place for place, name in enumerate(new)}
    description = json.loads(files[FILE])
    description["added_tokens"] = [
        *(description.get("added_tokens") or ()),
        *({"id": number, "content": name, **_FLAGS} for name, number in numbers.items()),
    ]
    files[FILE] = json.dumps(description, ensure_ascii=False, indent=1) + "\n"
    for name in (CONFIG_FILE, MAP_FILE):
        if name in files:
            files[name] = _told(files[name], numbers)
    changed = FileTokenizer(files)
    assert all(changed.control[name] == number for name, number in {**tokenizer.control, **numbers}.items())
    if any(changed.numbered(name) != number for name, number in numbers.items()):
        raise UserError(
            "the tokenizers library gives the new tokens other ids", why="the vocabulary has gaps",
            fix="save the tokenizer with transformers once, which closes them",
        )
    return changed


def _told(text: str, numbers: dict[str, int]) -> str:
    """A companion file that lists the new tokens where it lists others."""
    config = json.loads(text)
    if isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"] |= {
            str(number): {"content": name, **_FLAGS} for name, number in numbers.items()
        }
    if isinstance(config.get("additional_special_tokens"), list):
        config["additional_special_tokens"] += list(numbers)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _require_name(tokenizer: FileTokenizer, name: str) -> None:
    if len(name) < 2 or any(letter.isspace() for letter in name):
        raise UserError(
            f"{name!r} is no name for a control token", why="one letter or a blank would be cut out of every text",
            fix="<|user|>, say",
        )
    if tokenizer.numbered(name) is not None:
        raise UserError(
            f"{name} is a word of the vocabulary", why="every text that holds it would change",
            fix=f"another name: <|{name}|>",
        )
