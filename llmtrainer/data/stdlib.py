"""The running Python's own library as a corpus: real text that is on every machine."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import SourceFile

PREFIX = "stdlib:"
PARTS = ("train", "held_out")
QUESTIONS = {"questions": "train", "held_out_questions": "held_out"}
"""Names under which the same modules are wanted as questions and answers, which the reader of docstrings makes."""
HELD_OUT_SHARE = 0.03
HELD_OUT_BYTES = 1_000_000
"""At most so much is held out: enough to measure with, and it has to be compressed by three programs for the demo."""
_FOREIGN = frozenset({"site-packages", "dist-packages", "__pycache__"})


def means_questions(name: str) -> bool:
    """Whether a name stands for questions about the library, and not for its modules as text."""
    return name.startswith(PREFIX) and name.removeprefix(PREFIX) in QUESTIONS


def find(name: str) -> list[SourceFile]:
    """The modules of `stdlib:train` or `stdlib:held_out`, by path; the same ones of `stdlib:questions` or
    `stdlib:held_out_questions`.

    Held out are the modules whose path has one of the smallest hashes, about 3% and below a megabyte; the same for
    everyone who has the same modules. Left out of both: what is no UTF-8 or empty, what others installed, and
    from the training part every copy of a file that is held out.
    """
    given = name.removeprefix(PREFIX)
    part = QUESTIONS.get(given, given)
    if part not in PARTS:
        known = (f"`{PREFIX}{part}`" for part in (*PARTS, *QUESTIONS))
        raise UserError(f"no corpus `{name}`", fix=" or ".join(known))
    root = Path(sysconfig.get_path("stdlib"))
    held_out, train = split(root)
    if not held_out or not train:
        raise UserError(
            "this Python has no library to learn from",
            where=str(root),
            why="its modules are missing or packed in an archive",
            fix="name a folder of text: data=FOLDER",
        )
    return held_out if part == "held_out" else train


def split(root: Path) -> tuple[list[SourceFile], list[SourceFile]]:
    """(held out, train) of the modules below a folder, each in order of their paths."""
    digests = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        if _FOREIGN.isdisjoint(path.relative_to(root).parts) and (content := _utf8(path)):
            digests[SourceFile(path, len(content))] = hashlib.sha256(content).digest()
    held_out: set[SourceFile] = set()
    room = HELD_OUT_BYTES
    for file in sorted(digests, key=lambda file: _place(file, root)):
        if _place(file, root) >= HELD_OUT_SHARE:
            break
        if file.bytes <= room:
            held_out.add(file)
            room -= file.bytes
    measured = {digests[file] for file in held_out}
    return (
        [file for file in digests if file in held_out],
        [file for file in digests if file not in held_out and digests[file] not in measured],
    )


def _place(file: SourceFile, root: Path) -> float:
    digest = hashlib.sha256(Path(str(file.path)).relative_to(root).as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _utf8(path: Path) -> bytes:
    """A module's bytes, or none if they are no UTF-8 (the library tests its decoders with such files)."""
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    return content
