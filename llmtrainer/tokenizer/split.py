"""How text is cut into the pieces inside which a byte-level vocabulary merges, and which ids text cannot
write."""

from __future__ import annotations

import re
from collections.abc import Iterator

CONTROL_NAMES = (
    "<|begin|>",
    "<|endoftext|>",
    "<|endofprompt|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|unk|>",
    "<|pad|>",
    "<|cls|>",
    "<|sep|>",
    "<|mask|>",
    "<|bos|>",
    "<|eos|>",
    "<|role_end|>",
)
"""The control tokens, in the order of their ids, which follow the base vocabulary without a gap."""

END, PAD = "<|endoftext|>", "<|pad|>"

ROLES = {
    "bos_token": "<|bos|>",
    "eos_token": END,
    "unk_token": "<|unk|>",
    "sep_token": "<|sep|>",
    "pad_token": PAD,
    "cls_token": "<|cls|>",
    "mask_token": "<|mask|>",
}
"""What transformers calls some of them."""

# Scripts written without blanks would make nearly every clause a distinct word, and memory in training grows
# with distinct words. Chinese is cut at 4 characters, alphabets and syllabaries without blanks at 8. Every
# other run has a bound too, so that no input (a base64 blob, a ruler of dashes) becomes one huge word.
_CHINESE = r"\p{Han}"
_NO_BLANKS = r"\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_LETTER = rf"[[\p{{L}}\p{{M}}]&&[^{_CHINESE}{_NO_BLANKS}]]"

SPLIT_RULE = "|".join(
    [
        r"'(?:[sdmt]|ll|ve|re)(?!\p{L})",  # he's, but not 'string'
        rf"{_CHINESE}{{1,4}}",
        rf"[{_NO_BLANKS}]{{1,8}}",
        # One blank or ASCII mark goes with the letters after it: ` self`, `.append`, `_name`. Other marks
        # (full-width commas, quotes) stay alone, or they would multiply the distinct words of mixed text.
        rf"[ \t!-/:-@\[-`{{-~]?{_LETTER}{{1,64}}",
        r"\p{N}{1,3}",
        # Marks keep the line break after them, `):` + newline, but never the next line's indentation: a
        # prompt that ends with a newline would otherwise be cut as no text in training was.
        r" ?[^\s\p{L}\p{M}\p{N}]{1,32}[\r\n]{0,8}",
        r"[^\S\r\n]{0,64}[\r\n]{1,16}",
        # Indentation, all but its last blank, which goes with the word.
        r"\s{1,64}(?!\S)",
        r"\s",
    ]
)
"""Oniguruma pattern; its matches, one after the other, are the whole text."""

_SAFE_CUT = re.compile(r"(?<=[A-Za-z0-9\u4e00-\u9fa5])(?=\n)")


def cut(text: str, longest: int) -> Iterator[str]:
    """Pieces of about `longest` characters whose ids, one piece after the other, are the ids of the whole
    text.

    Cut is only between a letter or digit and a newline: no match of SPLIT_RULE holds both, and no look-ahead
    that starts before such a place tells a newline from the end of the text. Without such a place a piece is
    longer.
    """
    start = 0
    while len(text) - start > longest:
        place = _SAFE_CUT.search(text, start + longest)
        if place is None:
            break
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]
