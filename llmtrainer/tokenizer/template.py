"""Which chat template is meant: the tokenizer's own, a built-in one by name, or a file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from llmtrainer.base.errors import UserError
from llmtrainer.base.text import did_you_mean
from llmtrainer.tokenizer.tokenizer import TEMPLATE_FILE, FileTokenizer

SUFFIX = ".jinja"
_NEEDS = re.compile(r"\{#- needs: (.*?) -#\}\n")


@dataclass(frozen=True)
class Chosen:
    """The text of a template, and where it is from."""

    texts: Mapping[str, str]
    """`default`, and `tool_use` if there is one for conversations with tools."""
    where: str


def built_in() -> list[str]:
    """Names of the templates that lie with this program."""
    folder = resources.files("llmtrainer.tokenizer") / "templates"
    return sorted(file.name.removesuffix(SUFFIX) for file in folder.iterdir() if file.name.endswith(SUFFIX))


def choose(tokenizer: FileTokenizer, template: str) -> Chosen:
    """The template that a setting names. UserError where there is none, or the tokenizer lacks a control token that
    a built-in one writes."""
    if template == "auto":
        if "default" not in tokenizer.chat_templates:
            raise UserError(
                "the tokenizer has no chat template of its own", why=f"built in are: {', '.join(built_in())}",
                fix="template=chatml, or a path to a .jinja file",
            )
        return Chosen(tokenizer.chat_templates, "the tokenizer's own chat template")
    path = Path(template)
    if path.suffix == SUFFIX:
        if not path.is_file():
            raise UserError(f"there is no file {template}", fix="a path to a .jinja file that is there")
        return Chosen({"default": path.read_text(encoding="utf-8")}, template)
    _require(tokenizer, template)
    text = _NEEDS.sub("", _text(template), count=1)
    if "begin_token" in text:
        # What this tokenizer puts before a text, written down: other programs know no such word.
        names = {number: name for name, number in tokenizer.control.items()}
        begin = "" if tokenizer.begin is None else names.get(tokenizer.begin, "")
        text = f"{{%- set begin_token = {json.dumps(begin, ensure_ascii=False)} %}}\n{text}"
    return Chosen({"default": text}, f"the built-in chat template {template}")


def needed(template: str) -> tuple[str, ...]:
    """Names of the control tokens that a built-in template writes, besides those that begin and end a text."""
    found = _NEEDS.match(_text(template))
    return tuple(found[1].split()) if found else ()


def _text(template: str) -> str:
    if template not in (known := built_in()):
        raise UserError(
            f"there is no chat template `{template}`",
            why=f"built in are: {', '.join(known)}; or a path to a .jinja file", fix=did_you_mean(template, known),
        )
    return (resources.files("llmtrainer.tokenizer") / "templates" / f"{template}{SUFFIX}").read_text("utf-8")


def _require(tokenizer: FileTokenizer, name: str) -> None:
    missing = [token for token in needed(name) if token not in tokenizer.control]
    if missing:
        one = len(missing) == 1
        raise UserError(
            f"the tokenizer lacks {'a control token' if one else f'{len(missing)} control tokens'} of the chat "
            f"template {name}", why=f"{', '.join(missing)} would be ordinary text, which users can write too",
            fix=f"llmtrainer add-tokens MODEL out=FOLDER template={name}",
        )


def with_template(tokenizer: FileTokenizer, chosen: Chosen) -> FileTokenizer:
    """The same tokenizer with the template among its files, as transformers looks for it there."""
    if chosen.texts == tokenizer.chat_templates:
        return tokenizer
    return tokenizer.with_file(TEMPLATE_FILE, chosen.texts["default"])
