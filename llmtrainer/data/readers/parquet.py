"""Parquet tables, a few rows at a time and only the column that holds the text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import Reader, Reading

ROWS = 64
"""Rows decoded at a time."""
_BUFFER = 2**18


class Parquet(Reader):
    """One row is one document."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    seeks: ClassVar[bool] = True

    def records(self, stream: BinaryIO, path: Path, reading: Reading) -> Iterator[tuple[object, int | None]]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            # A buffer and no read-ahead: a column chunk is read page by page, not whole.
            table = ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)
            names = table.schema_arrow.names
            field = next((name for name in reading.fields if name in names), None)
            if field is None:
                reading.text_of(dict.fromkeys(names), str(path))
            for batch in table.iter_batches(ROWS, columns=[field], use_threads=False):
                for value in batch.column(0).to_pylist():
                    yield {field: value}, None
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
            raise UserError(
                "the table cannot be read", where=str(path), why=str(error).splitlines()[0],
                fix="fetch the file again; is it really parquet?",
            ) from error
