"""A program of its own, run inside a sandbox: which answers are mathematically the right ones.

Reads one JSON object {"paths", "digits", "seconds", "pairs": [[right, answer], ...]} and prints one JSON line for each
pair, as soon as it is decided: 1, 0, or the name of what went wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence


def main() -> None:
    task = json.load(sys.stdin)
    sys.path.extend(task["paths"])
    for right, answer in task["pairs"]:
        print(json.dumps(decided(right, answer, task["digits"], task["seconds"])), flush=True)


def decided(right: str, answer: str, digits: int, seconds: int) -> int | str:
    """Whether `answer` (a text, its box if it has one) is equivalent to `right` (what stood in a box)."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        wanted: Sequence[object] = parse(rf"\boxed{{{right}}}", parsing_timeout=seconds, raise_on_error=True)
        found: Sequence[object] = parse(answer, parsing_timeout=seconds, raise_on_error=True)
        if not wanted or not found:
            return 0
        return int(verify(
            wanted, found, float_rounding=digits, timeout_seconds=seconds, raise_on_error=True
        ))  # fmt: skip
    except TimeoutException:
        return "time"
    except MemoryError:
        return "memory"
    except Exception as error:      # sympy raises whatever it likes over what a model wrote
        return type(error).__name__


if __name__ == "__main__":
    main()
