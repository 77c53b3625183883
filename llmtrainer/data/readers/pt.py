"""Tensors (or texts) that `torch.save` wrote: `.pt`, `.pth`."""

from __future__ import annotations

import pickle
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
            value = torch.load(stream, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise UserError(
                "the file is not made of tensors and plain values", where=str(path),
                why=(str(error).splitlines() or [type(error).__name__])[0],
                fix="torch.save({'input_ids': [tensor, ...]}, FILE), or fetch the file again if it was cut",
            ) from error
        return records_in(value, path, reading)
