"""Tensors (or texts) that `torch.save` wrote: `.pt`, `.pth`."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar, Literal

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import AnyPath, Reader, Reading
from llmtrainer.data.values import records_in


class Pt(Reader):
    """A tensor, or lists and mappings of tensors or texts. Loaded whole, and never more than weights and plain
    values: a file that needs code to be run is refused."""

    suffixes: ClassVar[tuple[str, ...]] = (".pt", ".pth")
    seeks: ClassVar[bool] = True
    holds: ClassVar[Literal["text", "tokens"]] = "tokens"

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        import torch

        try:
            _require_alone(stream, path)
            value = torch.load(stream, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise UserError(
                "the file is not made of tensors and plain values", where=str(path),
                why=(str(error).splitlines() or [type(error).__name__])[0],
                fix="torch.save({'input_ids': [tensor, ...]}, FILE), or fetch the file again if it was cut",
            ) from error
        return records_in(value, path, reading)


def _require_alone(stream: BinaryIO, path: AnyPath) -> None:
    """What torch saves is an archive, and of two end to end only the last would be read."""
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            first = min((item.header_offset for item in archive.infolist()), default=0)
        if first > 0:
            raise UserError(
                f"{first:,} bytes stand in front of the tensors", where=str(path), why="they would not be read",
                fix="one torch.save a file: torch.save({'input_ids': [tensor, ...]}, FILE)",
            )
    stream.seek(0)
