"""Sample indexes: where each row of raw `.bin` files begins, ours and those that lie beside older corpora."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError

_NAME = re.compile(r"all_sample_index_map_([0-9]+)\.ibin")


def sample_index(lengths: Sequence[int], sequence_length: int) -> NDArray[np.int64]:
    """(file, first token in it) of every row, [rows, 2].

    Rows are laid end to end over the files, `sequence_length` tokens apart, and each reads one token more: a row
    runs on into the next file, empty files hold none, and the last row is one that has its next token.
    """
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    starts = np.arange(max(total - 1, 0) // sequence_length, dtype=np.int64) * sequence_length
    files = np.searchsorted(ends, starts, side="right")
    return np.stack([files, starts - (ends - lengths)[files]], axis=1) if len(starts) else np.zeros((0, 2), np.int64)


def indexes_in(folder: Path) -> list[Path]:
    """The `.ibin` files of a folder of raw `.bin` files."""
    return sorted(path for path in folder.glob("*.ibin") if _NAME.fullmatch(path.name))


def require_index(path: Path, files: Sequence[tuple[Path, int]]) -> int:
    """Compare a stored index (pairs of uint32, no header) with the files (name, tokens) and return its rows.

    Rows are cut from the files themselves, so a wrong index harms nobody here. It does say that the files are not
    those it was made from, or that it trained something else than it claims: UserError names the first bad row.
    """
    found = _NAME.fullmatch(path.name)
    assert found is not None
    sequence_length = int(found[1])
    expected = sample_index([tokens for _, tokens in files], sequence_length)
    stored = _stored(path)
    rows = min(len(stored), len(expected))
    wrong = np.flatnonzero((stored[:rows] != expected[:rows]).any(axis=1))
    row = int(wrong[0]) if len(wrong) else rows
    if row == len(stored) == len(expected):
        return rows
    says, cause = _place(stored, row, files), _cause(files, row, sequence_length)
    raise UserError(
        "the sample index does not fit its files",
        where=f"{path}, row {row + 1:,}",
        why=f"it says {says}, the {len(files):,} files say {_place(expected, row, files)}: {cause}",
        fix=f"rm {path}: rows are cut from the files themselves",
    )


def _cause(files: Sequence[tuple[Path, int]], row: int, sequence_length: int) -> str:
    ends = np.cumsum([tokens for _, tokens in files])
    borders = ends[(ends % sequence_length == 0) & (ends <= row * sequence_length) & (ends > 0)]
    if len(borders):
        name = files[int(np.searchsorted(ends, borders[-1]))][0].name
        return (
            f"{name} ends exactly where a row begins, where the program that wrote such indexes forgets to begin anew, "
            "or files were added, removed or changed since"
        )
    return "files were added, removed or changed since it was made"


def _place(index: NDArray[Any], row: int, files: Sequence[tuple[Path, int]]) -> str:
    if row >= len(index):
        return f"there are only {len(index):,} rows"
    file, token = index[row].tolist()
    return f"it begins at token {token:,} of " + (files[file][0].name if file < len(files) else f"file {file:,}")


def _stored(path: Path) -> NDArray[np.int64]:
    if path.stat().st_size % 8:
        raise UserError(
            "the sample index breaks off", where=str(path), why="it is not made of pairs of four-byte numbers",
            fix=f"rm {path}: rows are cut from the files themselves",
        )
    return np.fromfile(path, "<u4").reshape(-1, 2).astype(np.int64)
