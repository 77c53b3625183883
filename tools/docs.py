"""Writes the documentation that code can tell: docs/reference.md and the file list of docs/architecture.md.

`python tools/docs.py` writes, `python tools/docs.py --check` only says what is stale.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- files: written by `make docs` -->\n", "<!-- end of files -->\n"


def file_list() -> str:
    """Every module with the first sentence of its docstring, folder by folder."""
    lines = ["```text"]
    folder = None
    for path in sorted((ROOT / "llmtrainer").rglob("*.py"), key=lambda path: (path.parent, path.name)):
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            continue
        if path.parent != folder:
            folder = path.parent
            lines.append(f"{folder.relative_to(ROOT).as_posix()}/")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        sentence = " ".join(docstring.partition("\n\n")[0].split())
        name = path.relative_to(ROOT / "llmtrainer").as_posix()
        lines.append(f"  {name:<32} {sentence}")
    return "\n".join([*lines, "```", ""])


def architecture() -> str:
    """docs/architecture.md with its file list renewed."""
    before, _, rest = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + file_list() + END + rest.partition(END)[2]


def reference() -> str:
    """Every key of every verb: type, default, help."""
    from llmtrainer.base.explain import key_entries
    from llmtrainer.base.verbs import VERBS

    parts = [
        "# Reference",
        "Every key of every verb, written by `make docs` from the text under the fields. The keys of `train` "
        "and `check` are those of a recipe; for another kind of a part, `llmtrainer explain FILE.yaml`.",
    ]
    for name, verb in VERBS.items():
        if name == "check":
            continue
        parts.append(f"## {name}\n\n{verb.purpose[0].upper()}{verb.purpose[1:]}.")
        rows = ["| key | default | type | |", "|---|---|---|---|"]
        for entry in key_entries(verb.config_type()):
            cells = (f"`{entry.key}`", f"`{entry.value}`", entry.type, entry.help)
            plain = [" ".join(str(cell).split()).replace("|", "\\|") for cell in cells]
            rows.append("| " + " | ".join(plain) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    stale = 0
    for name, text in (("docs/architecture.md", architecture()), ("docs/reference.md", reference())):
        path = ROOT / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
        print(f"{name}: {'stale, run `make docs`' if '--check' in arguments else 'written'}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
