"""Jinja templates from anywhere, run where they can neither reach anything nor grow without bound."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_int, do_round
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtrainer.base.errors import UserError

MAXIMUM_ROUNDS = 100_000
"""Passes through loops and macros in one render, beyond one for each character of the conversation."""
MAXIMUM_TEXT = 2**22
"""Characters of one text or list, beyond eight times what the conversation has."""
ITEM = 16
"""What an item of a list weighs, in characters."""
MAXIMUM_WORK = 2**27
"""Characters that all operations of one render make or read, beyond 256 times what the conversation has."""

STRING_METHODS = frozenset([
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper",
])
"""What a template may call of a text. What pads to a width is left out: it makes gigabytes of one word."""
FILTERS = frozenset([
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape",
    "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "striptags", "sum",
    "title", "trim", "truncate", "unique", "upper", "urlencode", "wordcount",
])
_DATE_FORMAT = re.compile(r"(?:[^%]|%-?[A-Za-z%]){0,100}")


class Template:
    """A compiled chat template. The same words as transformers gives them are there: `tojson` that escapes no HTML,
    `raise_exception`, `strftime_now`, `{% generation %}`, `break` and `continue`; blocks leave no line behind."""

    def __init__(self, source: str, where: str, day: date | None = None) -> None:
        """`day`: what the template's clock shows. UserError where the template is no Jinja."""
        self.source, self.where = source, where
        self._environment = _Environment(day, where)
        try:
            self._compiled = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                "the chat template is no Jinja", where=f"{where}, line {error.lineno}", why=error.message,
                fix="mend the line, or name a built-in template",
            ) from error
        except (SecurityError, RecursionError) as error:
            raise UserError("the chat template was stopped", where=where, why=str(error)) from error

    def render(self, values: Mapping[str, Any], size: int, marks: Callable[[str], bool] | None = None) -> str:
        """The text. `size`: characters of the conversation, to which the bounds are relative. `marks`: which
        characters must survive where the template asks for pure ASCII. UserError where the template refuses."""
        self._environment.begin(size, marks)
        try:
            return self._environment.joined(self._compiled.generate(**values))
        except SecurityError as error:
            raise UserError("the chat template was stopped", where=self.where, why=str(error)) from error
        except UserError:
            raise
        except RecursionError as error:
            raise UserError(
                "the chat template was stopped", where=self.where, why="it calls itself without end"
            ) from error
        except Exception as error:  # jinja2's own, or whatever Python says of what the template does with its values
            raise UserError(
                "the chat template refuses the conversation", where=self.where, why=str(error) or type(error).__name__,
            ) from error


class _Generation(Extension):
    """`{% generation %}`: what transformers' own masks go by. What it holds is rendered, and proved as any other."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 asks for it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, behind which Python keeps its own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _require_open(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_open(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"    # of what it holds, in which another could hold it twice, no text is made


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, day: date | None, where: str) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._day, self._where = day, where
        self._state = threading.local()
        self.begin(0, None)
        self.filters = {name: self._charged(self.filters[name]) for name in FILTERS} | {
            "tojson": self._to_json, "join": self._join_filter, "indent": self._indent_filter,
            "replace": lambda text, old, new, count=-1: self._replace(str(text), str(old), str(new), count),
            "string": self._string_filter, "round": self._round_filter, "int": self._int_filter,
        }
        self.finalize = self._weighed    # what becomes text behind our back, in `{{ value }}`
        del self.globals["lipsum"], self.globals["cycler"]
        self.globals |= {
            "raise_exception": _raise, "strftime_now": self._now, "namespace": _Namespace,
            "dict": self.mapped,
        }
        self.concat = self.joined  # type: ignore[method-assign]  # what macros and set blocks are joined by

    def begin(self, size: int, marks: Callable[[str], bool] | None) -> None:
        state = self._state
        state.rounds, state.work = MAXIMUM_ROUNDS + size, MAXIMUM_WORK + 256 * size
        state.longest, state.marks = MAXIMUM_TEXT + 8 * size, marks

    def tick(self) -> str:
        """One more pass through a loop or a macro."""
        self._state.rounds -= 1
        if self._state.rounds < 0:
            raise SecurityError(f"it went through its loops more than {MAXIMUM_ROUNDS:,} times")
        return ""

    def joined(self, parts: Iterable[Any]) -> str:
        """All parts as one text, as long as it may be."""
        kept: list[str] = []
        length, longest = 0, self._state.longest
        for part in parts:
            kept.append(str(part))
            length += len(kept[-1])
            if length > longest:
                self._bound(length)
        self._charge(length)
        return "".join(kept)

    def concatenated(self, *parts: Any) -> str:
        """`a ~ b`."""
        return self.joined(parts)

    def added(self, context: jinja2.runtime.Context, *items: Any) -> Any:
        """`a + b + c`, of which each sum is a text or a list of its own."""
        if all(type(item) is str for item in items):
            return self.joined(items)
        return functools.reduce(lambda left, right: self.call_binop(context, "+", left, right), items)

    def listed(self, *items: Any) -> list[Any]:
        """`[a, b]`."""
        self._charge(self._weight(items))
        return list(items)

    def tupled(self, *items: Any) -> tuple[Any, ...]:
        """`(a, b)`."""
        self._charge(self._weight(items))
        return items

    def mapped(self, *items: Any, **named: Any) -> dict[Any, Any]:
        """`{a: b, c: d}`, its keys and values in turn, and `dict(c=d)`."""
        self._charge(self._weight((items, named)))
        given = [dict(item) for item in items] if len(items) == 1 else [dict(zip(items[::2], items[1::2], strict=True))]
        return dict(*given, **named)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self._charge(self._bound(self._weight(left) + self._weight(right)))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    self._charge(self._bound(self._weight(one) * max(other, 0)))
        elif operator == "%" and isinstance(left, str):
            if re.search(r"%[^%A-Za-z]*(\d{3}|[*(])", left):
                raise SecurityError("it pads a text to a width")
            self._charge(self._bound(len(left) + left.count("%") * (99 + self._weight(right))))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > 4_096:
                raise SecurityError("it makes a number of more than 4,096 bits")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing: `format` pads to widths, and is no method that a template may call."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in STRING_METHODS:
            return False
        if isinstance(obj, jinja2.runtime.LoopContext):     # asked at every pass, and neither code nor a list
            return not attr.startswith("_")
        return not isinstance(obj, int | float | bytes) and super().is_safe_attribute(obj, attr, value)

    def call(self, context: jinja2.runtime.Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if text is self:    # what `_Making` and `_parse` call, of which nothing need be asked
            return obj(*args, **{key: value for key, value in kwargs.items() if not key.startswith("_")})
        if isinstance(text, str):
            self._charge(len(text))
            # Jinja's own arguments, for functions that ask for its variables.
            given = {key: value for key, value in kwargs.items() if not key.startswith("_")}
            if name == "replace":
                return self._replace(text, *args, **given)
            if name == "join":
                return self._join(text, *args, **given)
        return super().call(context, obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        found: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *template.find_all(nodes.For), *template.find_all(nodes.Macro), *template.find_all(nodes.CallBlock)
        ]
        for node in found:
            called = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None, lineno=node.lineno)
            node.body.insert(0, nodes.ExprStmt(called, lineno=node.lineno))
        _Making().visit(template)
        template.set_environment(self)
        return template

    def _weight(self, value: Any) -> int:
        """Characters that a value stands for, those of lists inside it as often as they stand there; bounded."""
        if isinstance(value, str):
            return len(value)
        weight = 0
        left = [value]
        while left:
            item = left.pop()
            weight += len(item) if isinstance(item, str) else ITEM
            if isinstance(item, list | tuple):
                left += item
            elif isinstance(item, Mapping):
                left += item.keys()
                left += item.values()
            self._bound(weight)
        return weight

    def _lines(self, value: Any, width: int, depth: int = 1) -> int:
        """Characters that JSON in lines of their own begins with."""
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        if not width or not inside:
            return 0
        self._bound(length := width * depth * (len(inside) + 1))
        return length + sum(self._lines(item, width, depth + 1) for item in inside)

    def _weighed(self, value: Any) -> Any:
        """A value that is to become text, unless its text would be too long."""
        if not isinstance(value, str):
            self._charge(self._weight(value))
        return value

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter of jinja2's, whose texts and lists count as work."""
        @functools.wraps(function)      # with what says that it wants the environment
        def run(*given: Any, **named: Any) -> Any:
            self._charge(ITEM + sum(len(one) for one in given if isinstance(one, str | list | tuple)))
            return function(*given, **named)

        return run

    def _string_filter(self, value: Any) -> str:
        return str(self._weighed(value))

    def _round_filter(self, value: Any, precision: int = 0, method: str = "common") -> Any:
        if abs(precision) > 100:
            raise SecurityError("it makes a number of more than 100 digits")
        return do_round(value, precision, method)    # type: ignore[arg-type]

    def _int_filter(self, value: Any, default: int = 0, base: int = 10) -> int:
        if isinstance(value, str) and len(value) > 1_000:
            raise SecurityError("it makes a number of more than 1,000 digits")
        return do_int(value, default, base)

    def _bound(self, length: int) -> int:
        if length > self._state.longest:
            raise SecurityError(f"it makes a text of more than {self._state.longest:,} characters")
        return length

    def _charge(self, work: int) -> None:
        self._state.work -= work
        if self._state.work < 0:
            raise SecurityError("it works on more text than any conversation needs")

    def _replace(self, text: str, old: str, new: str, count: int | None = -1) -> str:
        found = text.count(old)
        if count is not None and count >= 0:
            found = min(found, count)
        self._charge(self._bound(len(text) + found * max(len(new) - len(old), 0)))
        return text.replace(old, new, -1 if count is None else count)

    def _join(self, between: str, parts: Iterable[Any]) -> str:
        parts = [part if isinstance(part, str) else str(part) for part in parts]
        self._charge(self._bound(sum(map(len, parts)) + len(between) * max(len(parts) - 1, 0)))
        return between.join(parts)

    def _join_filter(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = [self.getitem(item, attribute) for item in value]
        return self._join(str(d), value)

    def _indent_filter(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        margin = width if isinstance(width, str) else " " * min(max(width, 0), 64)
        lines = str(s).splitlines(keepends=True)
        self._charge(self._bound(len(s) + len(lines) * len(margin)))
        return "".join(
            margin + line if (place or first) and (blank or line.strip()) else line for place, line in enumerate(lines)
        )

    def _to_json(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None,
        separators: Sequence[str] | None = None, sort_keys: bool = False,
    ) -> str:
        width = len(indent) if isinstance(indent, str) else max(indent or 0, 0)
        pair = None if separators is None else (str(separators[0]), str(separators[1]))
        if width > 64 or (pair is not None and len(pair[0]) + len(pair[1]) > 64):
            raise SecurityError("it pads a text to a width")
        self._charge(self._bound(self._weight(value) + self._lines(value, width)))
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)
        self._charge(self._bound(len(text)))
        marks = self._state.marks
        if marks is None or not ensure_ascii:
            return text

        def shown(match: re.Match[str]) -> str:
            letter: str = json.loads(f'"{match[0]}"')
            return letter if marks(letter) else match[0]

        return re.sub(r"\\udb[89a-f][0-9a-f]\\ud[c-f][0-9a-f]{2}", shown, text)

    def _now(self, form: str) -> str:
        if self._day is None:
            raise UserError(
                "the chat template asks for the date, and none is given", where=self._where,
                why="the same data would become other tokens tomorrow", fix=f"date={date.today().isoformat()}",
            )
        if not _DATE_FORMAT.fullmatch(form):
            raise SecurityError(f"it asks for the date in the form {form[:40]!r}")
        return datetime.combine(self._day, time()).strftime(form)


class _Making(jinja2.visitor.NodeTransformer):
    """What makes texts and lists, as calls that can be bounded."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        return self._called("concatenated", node, node.nodes)

    def visit_Add(self, node: nodes.Add) -> nodes.Call:
        items: list[nodes.Expr] = [node.right]
        left = node.left
        while isinstance(left, nodes.Add):
            items.append(left.right)
            left = left.left
        return self._called("added", node, [nodes.ContextReference(), *reversed([*items, left])])

    def visit_List(self, node: nodes.List) -> nodes.Call:
        return self._called("listed", node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        if node.ctx == "load":
            return self._called("tupled", node, node.items)
        self.generic_visit(node)
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Call:
        return self._called("mapped", node, [side for pair in node.items for side in (pair.key, pair.value)])

    def _called(self, name: str, node: nodes.Expr, arguments: list[nodes.Expr]) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=node.lineno)
        self.generic_visit(call)
        return call


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _require_open(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace")
