"""Arrow tables as they lie in memory (`.arrow`, `.feather`): a stream or a file, only the columns with the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import AnyPath, Reader, Reading, require_end

ROWS = 64
"""Rows that become Python objects at a time."""


class Arrow(Reader):
    """One row is one document. What `datasets` caches is a stream, what `feather` writes is a file."""

    suffixes: ClassVar[tuple[str, ...]] = (".arrow", ".feather", ".ipc")
    seeks: ClassVar[bool] = True

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        import pyarrow
        from pyarrow import ipc

        try:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            open_table = ipc.open_file if is_file else ipc.open_stream
            names = open_table(stream).schema.names
            fields = reading.chosen(names)
            if not fields:
                reading.content_of(dict.fromkeys(names), str(path))
            stream.seek(0)
            chosen = ipc.IpcReadOptions(included_fields=[names.index(field) for field in fields], use_threads=False)
            table = open_table(stream, options=chosen)
            batches = (table.get_batch(index) for index in range(table.num_record_batches)) if is_file else table
            for batch in batches:
                for start in range(0, batch.num_rows, ROWS):
                    for record in batch.slice(start, ROWS).to_pylist():
                        yield record, None
            if not is_file:
                require_end(stream, path, "the table", "one table a file: pyarrow.concat_tables(tables)")
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
            raise UserError(
                "the table cannot be read", where=str(path), why=str(error).splitlines()[0],
                fix="fetch the file again; is it really an Arrow stream or file?",
            ) from error
