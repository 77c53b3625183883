"""Budgets: how long files and functions may be, and that the ground floor loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 60
COLUMNS = 120
TRAINER_LINES = 250
OWN_BUDGETS = {"llmtrainer/training/trainer.py": TRAINER_LINES}
FOLDERS = ("llmtrainer", "tools")
WITHOUT_TORCH = ("torch", "numpy", "matplotlib", "tokenizers", "pyarrow")


def sources(root: Path) -> list[Path]:
    """Every Python file that has a budget, in order."""
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def too_long(root: Path) -> Iterator[str]:
    """One line per file or function above its budget."""
    for path in sources(root):
        name, text = path.relative_to(root).as_posix(), path.read_text()
        lines, budget = len(text.splitlines()), OWN_BUDGETS.get(name, FILE_LINES)
        if lines > budget:
            yield f"{name}: {lines} lines, budget {budget}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield f"{name}:{node.lineno}: {node.name} has {length} lines, budget {FUNCTION_LINES}"


def not_plain(root: Path) -> Iterator[str]:
    """One line per source line that is not ASCII. (Its width is ruff's business.)"""
    for path in sources(root):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.isascii():
                yield f"{path.relative_to(root).as_posix()}:{number}: not ASCII"


def heavy_at_start(root: Path) -> Iterator[str]:
    """One line per heavy package that the public name, the ground floor or the command line loads."""
    base = [f"llmtrainer.base.{path.stem}" for path in sorted((root / "llmtrainer/base").glob("[a-z]*.py"))]
    code = "\n".join([
        "import importlib, sys",
        f"for name in {['llmtrainer', *base, 'llmtrainer.apps.cli']!r}: importlib.import_module(name)",
        f"print(*[name for name in {WITHOUT_TORCH!r} if name in sys.modules])",
    ])
    # The child must see the checkout even where the package is not installed.
    found = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True, check=True)
    for name in found.stdout.split():
        yield f"llmtrainer.base or llmtrainer.apps.cli loads {name} at import"


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    problems = [*too_long(root), *not_plain(root), *heavy_at_start(root)]
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"size: {len(sources(root))} files, {len(problems)} over budget")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
