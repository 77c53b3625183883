"""Kill the writing of a store at chosen lines of its code: `python -m tests.data.storm FOLDER LINE...`.

Each argument is one life: a forked process that writes until it has run so many lines of the writing modules and then
kills itself with SIGKILL, as nothing can clean up after. A last life without limit must finish. Prints the number of
lines that the last life ran.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from llmtrainer.data import encode, shards
from llmtrainer.data.encode import write_store
from llmtrainer.data.open import find
from tests.data.worlds import load_bytes

WATCHED = (encode.__file__, shards.__file__)


def write(folder: Path) -> None:
    """A store of several shards out of the texts in `folder`."""
    write_store(find(folder / "text"), folder, load_bytes, folder / "store", shard_tokens=700, batch_bytes=500)


def live(folder: Path, lines: int | None) -> int:
    """Write until `lines` lines have run. Returns how many did."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            count += 1
            if lines is not None and count > lines:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    write(folder)
    sys.settrace(None)
    return count


def main(folder: Path, lives: list[int]) -> None:
    """One forked process a life, then the last."""
    for lines in lives:
        child = os.fork()
        if child == 0:
            live(folder, lines)
            os._exit(0)
        os.waitpid(child, 0)
    print(live(folder, None))


if __name__ == "__main__":
    # Many storms in one process: starting Python a hundred times would take longer than all of them.
    for words in Path(sys.argv[1]).read_text().splitlines():
        place, *numbers = words.split()
        main(Path(place), [int(number) for number in numbers])
