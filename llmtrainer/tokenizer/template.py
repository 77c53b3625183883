"""Which chat template is meant: the tokenizer's own, a built-in one by name, or a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from llmtrainer.base.errors import UserError
from llmtrainer.base.text import did_you_mean
from llmtrainer.tokenizer.tokenizer import FileTokenizer

SUFFIX = ".jinja"
_NEEDS = re.compile(r"\{#- needs: (.*?) -#\}")


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
    if template in (known := built_in()):
        text = (resources.files("llmtrainer.tokenizer") / "templates" / f"{template}{SUFFIX}").read_text("utf-8")
        _require(tokenizer, text, template)
        return Chosen({"default": text}, f"the built-in chat template {template}")
    path = Path(template)
    if path.suffix != SUFFIX or not path.is_file():
        raise UserError(
            f"there is no chat template `{template}`", why=f"built in are: {', '.join(known)}",
            fix=did_you_mean(template, known) if path.suffix != SUFFIX else "a path to a .jinja file that is there",
        )
    return Chosen({"default": path.read_text(encoding="utf-8")}, str(path))


def _require(tokenizer: FileTokenizer, text: str, name: str) -> None:
    needs = _NEEDS.match(text)
    missing = [token for token in (needs[1].split() if needs else ()) if token not in tokenizer.control]
    if missing:
        named = ", ".join(f'"{token}"' for token in missing)
        raise UserError(
            f"the tokenizer lacks {len(missing)} control token{'s' if len(missing) > 1 else ''} that the chat template "
            f"{name} writes", why=f"{', '.join(missing)} would be ordinary text, which users can write too",
            fix=f"llmtrainer add-tokens MODEL out=FOLDER 'tokens=[{named}]'",
        )
