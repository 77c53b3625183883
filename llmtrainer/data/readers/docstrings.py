"""Python source as questions about its functions and classes, answered by their docstrings."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

from llmtrainer.base.errors import UserError
from llmtrainer.data.document import AnyPath, Reader, Reading, text_in

SHORTEST, LONGEST = 20, 400
"""Characters of an answer: a shorter docstring says nothing, a longer first paragraph is no answer."""
DETAILED = (7, 10, 13)
"""Words from which an answer says more: quarters of the library's answers, about."""
_TESTS = frozenset({"test", "tests", "idle_test"})

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Docstrings(Reader):
    """`What does NAME in MODULE do?` for every public function, class and method with a docstring, whose first
    paragraph is the answer: `messages`. And, for those who compare answers, that conversation as `chosen` and the same
    question answered by the module's next docstring as `rejected`; by its own words backwards, where there is no other.
    `broken_off` is the right answer, which stops half way: easier to tell, for a small model. `question` and `compared`
    are both comparisons behind one prompt, and `detail` is a grade: how much the answer says, 0 to 3 by its words.
    The source is parsed and never run; private modules and tests are left out."""

    suffixes: ClassVar[tuple[str, ...]] = (".py",)
    holds: ClassVar[Literal["text", "tokens", "records"]] = "records"

    def records(self, stream: BinaryIO, path: AnyPath, reading: Reading) -> Iterator[tuple[Any, int | None]]:
        module = module_of(path)
        if any(part in _TESTS or part.startswith("_") for part in module.split(".")):
            return
        yield from _questions(text_in(stream.read(), reading, path), module, str(path))


@lru_cache(maxsize=2_048)
def _questions(text: str, module: str, path: str) -> tuple[tuple[dict[str, Any], int], ...]:
    """The records of a module's source, each with its line. Kept, since a file is read twice, to tell its format and
    to learn from it, and parsing takes longer than all the rest."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # of a backslash in somebody's source
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        # Some modules of the library are broken on purpose; any other is somebody's data.
        if module != Path(path).stem:
            return ()
        raise UserError("the file is no Python source", where=path, why=str(error)) from error
    found = [
        (name, node.lineno, answer) for name, node in _definitions(tree)
        if SHORTEST <= len(answer := first_paragraph(ast.get_docstring(node) or "")) <= LONGEST
    ]  # fmt: skip
    answers = [answer for _, _, answer in found]
    records = []
    for place, (name, line, answer) in enumerate(found):
        question = f"What does {name} in {module} do?"
        another, begun = _another(answers, place), answer[: len(answer) // 2].rstrip()
        right, wrong, half = (_asked(question, text) for text in (answer, another, begun))
        records.append(({
            "messages": right, "chosen": right, "rejected": wrong, "broken_off": half, "question": right[:1],
            "compared": [{"chosen": answer, "rejected": worse} for worse in (begun, another)],
            "detail": bisect_right(DETAILED, len(answer.split())),
        }, line))    # fmt: skip
    return tuple(records)


def _asked(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _another(answers: list[str], place: int) -> str:
    """What answers another question: the next answer that is not the same, or else the same words backwards."""
    others = (answer for answer in [*answers[place + 1 :], *answers[:place]] if answer != answers[place])
    return next(others, " ".join(reversed(answers[place].split())))


def module_of(path: AnyPath) -> str:
    """The dotted name of a module of this Python's library; of any other file its name without the ending."""
    below, root = Path(str(path)), Path(sysconfig.get_path("stdlib"))
    if not below.is_relative_to(root):
        return below.stem
    parts = below.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def first_paragraph(docstring: str) -> str:
    """Its lines up to the first empty one, as one line."""
    return " ".join(docstring.strip().partition("\n\n")[0].split())


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """(name, node) of what a module defines for others, in order; a method is `Class.method`."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, Definition) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner
