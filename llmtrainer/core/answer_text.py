"""Where in what a model wrote its answer stands."""

from __future__ import annotations

import re
import unicodedata

NO_ANSWER = "no answer"


def final(text: str) -> str:
    """What follows the thinking: a text behind its last `</think>`; "" where the thinking never ends. What a model
    only considered is no answer."""
    behind = text.rpartition("</think>")[2]
    return "" if "<think>" in behind else behind


def answered(text: str) -> str:
    """What follows the thinking; where it has an `<answer>`, what stands in the last of them."""
    behind = final(text)
    _, mark, inside = behind.rpartition("<answer>")
    return inside.partition("</answer>")[0] if mark else behind


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` or `\fbox{}`; None where there is none, or it is never closed."""
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if not starts:
        return None
    depth, place = 1, starts[-1]
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[starts[-1] : place]
        place += 1
    return None


def has_box(text: str) -> bool:
    return re.search(r"\\(?:boxed|fbox)\s*\{", text) is not None


def narrow(text: str) -> str:
    """Full-width letters, digits and signs as ASCII (NFKC)."""
    return unicodedata.normalize("NFKC", text)
