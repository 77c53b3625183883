"""The Python library as a corpus: two disjoint parts, the same for everyone who has the same modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.data import stdlib
from llmtrainer.data.open import documents, find


def test_the_parts_of_this_python_are_disjoint_and_large_enough() -> None:
    train, held_out = find("stdlib:train"), find("stdlib:held_out")
    assert not {file.path for file in train} & {file.path for file in held_out}
    total = sum(file.bytes for file in train)
    assert total > 5_000_000 and 20_000 < sum(file.bytes for file in held_out) < 1_000_000
    assert all(file.path.suffix == ".py" and file.bytes for file in train + held_out)
    assert not [file for file in train + held_out if "site-packages" in file.path.parts]
    assert len(list(documents(held_out))) == len(held_out)


def tree(root: Path) -> Path:
    for number in range(400):
        path = root / f"p{number % 7}" / f"m{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"x = {number}\n" * 50)
    return root


def test_the_border_depends_on_names_alone(tmp_path: Path) -> None:
    first, second = stdlib.split(tree(tmp_path / "a")), stdlib.split(tree(tmp_path / "elsewhere" / "b"))
    for one, other, root in zip(first, second, ("a", "a"), strict=True):
        assert [file.path.relative_to(tmp_path / root) for file in one] == [
            file.path.relative_to(tmp_path / "elsewhere" / "b") for file in other
        ]
    assert len(first[0]) + len(first[1]) == 400 and 3 <= len(first[0]) <= 25
    names = {file.path for file in first[0]}
    (tmp_path / "a" / "new.py").write_text("new = 1\n")
    assert names <= {file.path for file in stdlib.split(tmp_path / "a")[0]}, "another module moves none"


def test_what_is_foreign_empty_undecodable_or_a_copy_is_left_out(tmp_path: Path) -> None:
    root = tree(tmp_path)
    held_out, _ = stdlib.split(root)
    for name in ("site-packages/x.py", "dist-packages/y.py", "p1/__pycache__/z.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("foreign = 1\n")
    (root / "empty.py").write_bytes(b"")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (root / "p0" / "copied.py").write_bytes(held_out[0].path.read_bytes())
    again, train = stdlib.split(root)
    assert again == held_out and len(train) + len(again) == 400


def test_the_held_out_part_has_a_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path)
    before, _ = stdlib.split(root)
    monkeypatch.setattr(stdlib, "HELD_OUT_BYTES", sum(file.bytes for file in before) // 2)
    capped, train = stdlib.split(root)
    assert 0 < len(capped) < len(before) and set(capped) < set(before)
    assert len(capped) + len(train) == 400, "what does not fit is trained on"


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(UserError, match="no corpus") as error:
        find("stdlib:test")
    assert "stdlib:held_out" in str(error.value.fix)
