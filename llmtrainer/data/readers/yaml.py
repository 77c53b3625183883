"""YAML files of short chats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar, Literal

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import AnyPath, Reader, Reading, text_in

LISTS = ("conversations", "messages", "data")
"""Under which key of a mapping its records stand."""


class Yaml(Reader):
    """The items of a list, or of the list `conversations` of a mapping. What looks like a number or a date is the
    text that it is written as: a chat holds texts."""

    suffixes: ClassVar[tuple[str, ...]] = (".yaml", ".yml")
    holds: ClassVar[Literal["text", "tokens", "records"]] = "records"

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError, YAMLError
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        try:
            root = YAML(typ="safe", pure=True).compose(text_in(stream.read(), reading, path))
        except MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1:,}" if error.problem_mark else ""
            raise _no_yaml(f"{path}{line}", str(error.problem)) from error
        except (YAMLError, RecursionError) as error:
            raise _no_yaml(str(path), (str(error).splitlines() or ["it is nested too deeply"])[0]) from error
        held = root
        if isinstance(root, MappingNode):
            named = {key.value: below for key, below in root.value}
            held = next((named[key] for key in LISTS if key in named), root)
        for node in held.value if isinstance(held, SequenceNode) else [] if held is None else [held]:
            yield _value(node, path, ()), node.start_mark.line + 1


def _value(node: Any, path: AnyPath, above: tuple[int, ...]) -> Any:
    from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

    if id(node) in above:    # an alias of what it stands in
        raise _no_yaml(f"{path}, line {node.start_mark.line + 1:,}", "a value holds itself")
    above = (*above, id(node))
    if isinstance(node, ScalarNode):
        return None if node.tag is not None and str(node.tag).endswith(":null") else str(node.value)
    if isinstance(node, SequenceNode):
        return [_value(item, path, above) for item in node.value]
    assert isinstance(node, MappingNode)
    return {str(key.value): _value(below, path, above) for key, below in node.value}


def _no_yaml(where: str, why: str) -> UserError:
    return UserError("a file is no YAML", where=where, why=why, fix="mend the file: quote a text that holds `: `")
