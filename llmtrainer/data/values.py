"""Documents in a Python value that came from a file: lists and mappings of texts, records, arrays and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import IDS, AnyPath, Reading
from llmtrainer.data.tokens import Ids, columns_of


def records_in(value: Any, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
    """What a reader gives, of a whole file's value.

    array or tensor  one dimension: ids end to end; two: each row a document
    list             each item a document: a text, a record, an array or a list of ids; or the ids themselves
    mapping          the entry that `fields` names, else that of `input_ids`, else each of its values
    """
    if reading.whole:
        yield from ((record, None) for record in _whole(value))
        return
    if isinstance(value, dict):
        found = reading.chosen([name for name in value if isinstance(name, str)])
        names = found if len(found) == 1 else (IDS,) if IDS in value else ()
        if names:
            yield from records_in(value[names[0]], path, reading)
            return
        value = [value] if found else list(value.values())
    array = _array(value, path)
    if array is not None:
        yield from _of_array(array, path, alone=True)
    elif isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        yield Ids(np.asarray(value), "stream"), None
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value, 1):
            yield from _document(item, f"{path}, item {number:,}", reading)
    else:
        yield from _document(value, str(path), reading)


def joined(values: list[Any]) -> list[Any]:
    """Several values of one file as one list: lists of documents end to end, and whatever else is a document."""
    found: list[Any] = []
    for value in values:
        many = isinstance(value, list | tuple) and not (value and all(type(item) is int for item in value))
        found += value if many else [value]
    return found


def _whole(value: Any) -> list[Any]:
    """The records of a value: the items of a list, or of each list of a mapping of lists; else the value itself."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict) and value and all(isinstance(held, list | tuple) for held in value.values()):
        held = [record for records in value.values() for record in records]
        if all(isinstance(record, dict) for record in held):
            return held
    return [value]


def _document(item: Any, where: str, reading: Reading) -> Iterator[tuple[Any, int | None]]:
    array = _array(item, where)
    if array is not None:
        yield from _of_array(array, where, alone=False)
    elif isinstance(item, dict) and IDS in item and not reading.chosen(list(item)):
        yield from _document(item[IDS], f"{where}, `{IDS}`", reading)
    elif isinstance(item, str | dict):
        yield item, None
    elif isinstance(item, list | tuple) and all(type(number) is int for number in item):
        try:
            yield Ids(np.asarray(item, dtype=np.int64)), None
        except OverflowError:
            raise UserError(
                f"a token id is {max(item, key=abs):,}", where=where, why="no vocabulary has that many ids",
                fix="save the ids as whole numbers of 32 bits",
            ) from None
    else:
        raise UserError(
            f"a document is a {type(item).__name__}", where=where,
            why="it is a text, a record with a text, or a list, an array or a tensor of token ids",
            fix="save a list of texts, or of tensors",
        )


def _of_array(array: np.ndarray[Any, Any], where: object, *, alone: bool) -> Iterator[tuple[Any, int | None]]:
    if array.dtype.kind == "U" and array.ndim == 1:
        yield from ((str(text), None) for text in array)
    elif array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise UserError(
            f"an array of type {array.dtype} with {array.ndim} dimensions holds no documents", where=str(where),
            why="ids are whole numbers in one dimension (end to end) or two (a document a row)",
            fix="save the ids as whole numbers",
        )
    else:
        yield from ((ids, None) for ids in columns_of(array, alone=alone))


def _array(value: Any, where: object) -> np.ndarray[Any, Any] | None:
    """An array, or a tensor as one."""
    if isinstance(value, np.ndarray):
        return value
    if type(value).__module__.partition(".")[0] != "torch" or not hasattr(value, "numpy"):
        return None
    if value.is_sparse or value.is_nested or str(value.layout) != "torch.strided":
        raise UserError(
            "a sparse or nested tensor holds no documents", where=str(where),
            why="ids are whole numbers, one after the other",
            fix="save .to_dense() of it, or a list of tensors",
        )
    # numpy has no bfloat16: a tensor of fractions is refused by its type anyway, whichever that is.
    return np.asarray((value.detach().double() if value.is_floating_point() else value).numpy())
