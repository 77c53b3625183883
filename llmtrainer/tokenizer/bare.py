"""A tokenizer.json without what text must not reach, and without what only the beginning of a text gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_word(token: Mapping[str, Any]) -> bool:
    """Whether an added token is ordinary text. GPT-NeoX and others added runs of blanks to their words: they name
    nothing, so nobody can forge anything with them."""
    return not token["special"] and token["content"].isspace()


def without_control(description: Mapping[str, Any], control: Mapping[str, int]) -> dict[str, Any]:
    """The same tokenizer with every added token removed, special or not; blanks are words and stay.

    GPT-2 and others list their control tokens among the words of the model too. There they go as well, unless
    a merge makes them: a pre-token that is a word as a whole may become its id without any merge.
    """
    words = [token for token in description.get("added_tokens") or () if is_word(token)]
    bare = {**description, "added_tokens": words, "post_processor": None}
    model = bare["model"]
    if model.get("type") == "BPE":
        made = {
            "".join(merge if isinstance(merge, list) else merge.split(" ", 1)) for merge in model["merges"]
        }
        kept = made | {model.get("unk_token")} | (set(model["vocab"]) - set(control))
        vocabulary = {token: number for token, number in model["vocab"].items() if token in kept}
        # The library numbers added tokens anew, unless the model lists them under their ids too.
        listed = {token["content"]: token["id"] for token in words}
        # Merges left out at random would give the same text other ids every time.
        bare["model"] = {**model, "vocab": vocabulary | listed, "dropout": None}
    elif model.get("type") == "Unigram":
        bare["model"] = {**model, "vocab": _unreachable(model, control)}
    return bare


def without_prefix(description: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text that goes on: no blank is put before its first word."""
    return {
        **description,
        "normalizer": _unprefixed(description.get("normalizer")),
        "pre_tokenizer": _unprefixed(description.get("pre_tokenizer")),
    }


def first_only(description: Mapping[str, Any]) -> bool:
    """Whether the blank in front is for a text's first part alone, and not for the parts behind control tokens."""
    rule = description.get("pre_tokenizer") or {}
    return any(part.get("prepend_scheme") == "first" for part in [rule, *rule.get("pretokenizers", ())])


def _unreachable(model: Mapping[str, Any], control: Mapping[str, int]) -> list[list[Any]]:
    # Ids of this kind of model are places in a list, so no entry can go. Of equal entries the last one counts: an
    # entry that repeats it is never chosen.
    entries = [list(entry) for entry in model["vocab"]]
    closed = {place for place, (text, _) in enumerate(entries) if text in control} | {model.get("unk_id")}
    last = max((place for place in range(len(entries)) if place not in closed), default=None)
    if last is not None:
        for place in closed:
            if place is not None and place < last:
                entries[place] = list(entries[last])
    return entries


def _unprefixed(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part.get("type") == "Prepend":
        return None
    changed = dict(part)
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            changed[key] = [kept for inner in part[key] if (kept := _unprefixed(inner)) is not None]
    if part.get("type") == "Metaspace":
        changed |= {"prepend_scheme": "never"}
        changed.pop("add_prefix_space", None)
    elif part.get("type") == "ByteLevel":
        changed |= {"add_prefix_space": False}
    elif part.get("type") == "Strip":
        changed |= {"strip_left": False}
    return changed
