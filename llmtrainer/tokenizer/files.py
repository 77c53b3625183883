"""What our tokenizer's files say: for the tokenizers library, for transformers, for ourselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer.split import CONTROL_NAMES, ROLES, SPLIT_RULE

FILE = "tokenizer.json"
CONFIG_FILE, MAP_FILE = "tokenizer_config.json", "special_tokens_map.json"


def pre_tokenizer() -> dict[str, Any]:
    """Our split rule, as tokenizer.json holds it."""
    split = {"type": "Split", "pattern": {"Regex": SPLIT_RULE}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, to_bytes]}


def byte_level_files(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The files of a byte-level BPE tokenizer, by name. The control tokens come directly after its vocabulary."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(vocabulary) + place, "content": name, **flags, "special": True}
        for place, name in enumerate(CONTROL_NAMES)
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
        "merges": [list(merge) for merge in merges],
    }
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": model,
    }
    others = [name for name in CONTROL_NAMES if name not in ROLES.values()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' way to say that a tokenizer sets no limit
        "additional_special_tokens": others,
        **ROLES,
    }
    return {
        FILE: json.dumps(description, ensure_ascii=False, indent=1) + "\n",
        CONFIG_FILE: json.dumps(config, indent=2) + "\n",
        MAP_FILE: json.dumps({**ROLES, "additional_special_tokens": others}, indent=2) + "\n",
    }


def parsed(files: Mapping[str, str], name: str, where: str) -> dict[str, Any]:
    """One of the files as JSON. UserError where it is none, or does not describe a tokenizer."""
    try:
        found = json.loads(files[name])
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name} is no JSON", where=f"{where}, line {error.lineno:,}", why=error.msg
        ) from error
    if not isinstance(found, dict) or (name == FILE and not isinstance(found.get("model"), dict)):
        raise UserError(f"{name} does not describe a tokenizer", where=where)
    return found


def not_unicode(texts: Sequence[str], error: Exception) -> Exception:
    """A half of a surrogate pair is no character: no UTF-8 text can hold it, so nothing could give it
    back."""
    for number, text in enumerate(texts):
        surrogates = _surrogates(text)
        for place in surrogates:
            return UserError(
                f"the text holds U+{ord(text[place]):04X}, half of a surrogate pair",
                where=f"text {number:,}, character {place:,}",
                why="it is not Unicode text: it was read with the wrong encoding or cut inside a character",
                fix='mend the file, or text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")',
            )
    return error


def _surrogates(text: str) -> Iterator[int]:
    return (match.start() for match in re.finditer("[\ud800-\udfff]", text))
