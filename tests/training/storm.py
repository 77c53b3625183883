"""Runs that are killed, whose disk is full and whose files are damaged: `python -m tests.training.storm PLAN.json`.

A life is a process, or two that train together, forked from one that has everything imported. It goes on where the
run stands and dies at a chosen operation on the run's files or between the processes: before it, behind it, or in the
middle of it, so that half of a file is lost. Between lives one file of a checkpoint may be damaged. A run that comes to
its end is compared with one that nothing happened to, and the next begins. Prints what became of all as JSON.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import steps
from llmtrainer.base.rundir import SEAL, RunDir, step_of
from llmtrainer.training import checkpoint
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train

FULL = 2
"""Exit code of a life that ended with a full disk: a UserError."""
SECONDS = 600.0
"""After which a life counts as hanging."""


@dataclass(frozen=True)
class Death:
    """How a life ends."""

    kind: str
    """before, behind, torn: killed there; full: no space is left from there on; outside: killed at any moment."""
    operation: int
    rank: int = 0


class Faults:
    """Watches every operation of this process on the files of checkpoints, and ends it at one of them."""

    def __init__(self, death: Death, checkpoints: Path) -> None:
        self.death, self.folder, self.operations = death, str(checkpoints), 0
        for owner, name in (
            (os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"),
            (io, "open"), (os, "open"), (safetensors.torch, "serialize_file"),
        ):
            setattr(owner, name, self.watched(getattr(owner, name), name))
        dist.all_reduce = self.watched_collective(dist.all_reduce)

    def watched_collective(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **named: Any) -> Any:
            self.operations += 1
            if self.operations == self.death.operation and self.death.kind in ("before", "behind", "torn"):
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*given, **named)

        return watched

    def watched(self, operation: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*given: Any, **named: Any) -> Any:
            path = self.path_of(given)
            reads = name == "open" and not any(isinstance(one, str) and set(one) & set("wax") for one in given[1:2])
            if path is None or reads:
                return operation(*given, **named)
            self.operations += 1
            due = self.operations == self.death.operation
            full = self.death.kind == "full" and self.operations >= self.death.operation
            if full and name not in ("unlink", "rmdir"):
                raise OSError(28, "No space left on device", path)
            if due and self.death.kind == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*given, **named)
            if due and self.death.kind == "torn" and Path(path).is_file():
                os.truncate(path, os.path.getsize(path) // 2)     # what the system had not written yet
            if due and self.death.kind in ("behind", "torn"):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return watched

    def path_of(self, given: Sequence[Any]) -> str | None:
        """The file of a checkpoint that an operation is about."""
        for one in given[:2]:
            if isinstance(one, int) and not isinstance(one, bool):
                try:
                    one = os.readlink(f"/proc/self/fd/{one}")
                except OSError:
                    continue
            if isinstance(one, str | Path) and str(one).startswith(self.folder):
                return str(one)
        return None


@dataclass
class Storm:
    """A run after the other, until all deaths were died."""

    recipe: Path
    folder: Path
    processes: int
    overrides: tuple[str, ...]
    seed: int
    told: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        # Whatever is imported late is there before the first life begins.
        train(load(Recipe, self.recipe, overrides=[*self.overrides, "engine.kind=single", f"run={self.folder}/warm"]))
        assert self.life("quiet", None) == [0] * self.processes, (self.folder / "log.txt").read_text()
        self.wanted = self.hashes("quiet"), self.curve("quiet")
        self.operations = [
            int((self.folder / f"operations-{rank}").read_text()) for rank in range(self.processes)
        ]

    def weather(self, kills: int, corruptions: int) -> dict[str, int]:
        """Die so many deaths and do so much damage. A life that comes to its end counts as none."""
        number, deaths, due = 0, 0, 0
        while deaths < kills or due:
            due += (deaths + 1) * corruptions // kills - self.told["damaged"] - due if deaths < kills else 0
            name = f"run{number}"
            if due and self.damaged(name):      # else when there is a checkpoint to fall back to
                due, self.told["damaged"] = due - 1, self.told["damaged"] + 1
            before = self.newest(name)
            codes = self.life(name, self.drawn())
            assert self.newest(name) >= before, f"death {deaths}: a whole checkpoint is gone"
            deaths += any(codes)
            if not any(codes):
                self.finished(name)
                number += 1
        assert self.life(f"run{number}", None) == [0] * self.processes, (self.folder / "log.txt").read_text()
        self.finished(f"run{number}")
        return dict(self.told)

    def drawn(self) -> Death:
        kind = self.draw.choices(("before", "behind", "torn", "full", "outside"), (3, 3, 2, 1, 1))[0]
        rank = 0 if kind == "full" else self.draw.randrange(self.processes)
        return Death(kind, self.draw.randint(1, self.operations[rank] * 2 // 3), rank)

    def life(self, name: str, death: Death | None) -> list[int]:
        """The exit codes of its processes; where one ends otherwise than in order, the others are ended too."""
        port, fatal = free_port(), death is not None
        children = [self.child(name, rank, port, death) for rank in range(self.processes)]
        moment = time.monotonic() + (self.draw.random() if death is not None and death.kind == "outside" else SECONDS)
        codes: dict[int, int] = {}
        while len(codes) < len(children):
            for rank, child in enumerate(children):
                if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
            if any(codes.values()) or time.monotonic() > moment:
                assert any(codes.values()) or (death is not None and death.kind == "outside"), "a life hangs"
                for rank, child in enumerate(children):
                    if rank not in codes:
                        os.kill(child, signal.SIGKILL)
                        codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.sched_yield()
        found = [codes[rank] for rank in range(self.processes)]
        if fatal and any(found):
            assert death is not None
            said = (self.folder / "log.txt").read_text()[-3000:]
            assert set(found) <= {0, FULL, -signal.SIGKILL} or self.processes > 1, said
            self.told["full" if FULL in found else "killed"] += 1
        return found

    def child(self, name: str, rank: int, port: int, death: Death | None) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            if self.processes > 1:
                os.environ.update(
                    RANK=str(rank), WORLD_SIZE=str(self.processes), LOCAL_RANK=str(rank),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            log = os.open(self.folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            faults = Faults(death or Death("none", 0), self.folder / name / "checkpoints")
            if death is not None and death.rank != rank:
                faults.death = Death("none", 0)
            train(load(Recipe, self.recipe, overrides=[*self.overrides, f"run={self.folder / name}"]))
            if death is None:
                (self.folder / f"operations-{rank}").write_text(str(faults.operations))
            code = 0
        except UserError as error:
            traceback.print_exc()
            code = FULL if "the disk is full" in error.what else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def damaged(self, name: str) -> bool:
        """Damage one file of a checkpoint, if there is another one to fall back to."""
        folders = [one for one in RunDir(self.folder / name).step_folders() if checkpoint.verify(one) is None]
        if len(folders) < 2:
            return False
        folder = self.draw.choice(folders)
        file = self.draw.choice(sorted(one for one in folder.rglob("*") if one.is_file()))
        held = bytearray(file.read_bytes())
        # Without its seal a checkpoint is as one of an earlier version: nothing is wrong with it.
        how = self.draw.choice(("bit", "cut") if file.name == SEAL else ("bit", "cut", "gone"))
        if how == "gone":
            file.unlink()
        elif how == "bit" and held:
            held[self.draw.randrange(len(held))] ^= 1 << self.draw.randrange(8)
            file.write_bytes(held)
        else:
            file.write_bytes(held[: len(held) // 2])
        assert checkpoint.verify(folder) is not None, f"{how} in {file} goes unnoticed"
        self.told[how] += 1
        return True

    def newest(self, name: str) -> int:
        whole = (one for one in RunDir(self.folder / name).step_folders() if checkpoint.verify(one) is None)
        return max(map(step_of, whole), default=0)

    def finished(self, name: str) -> None:
        found = self.hashes(name), self.curve(name)
        assert found == self.wanted, f"{name} ended otherwise than a quiet run"
        self.told["runs"] += 1

    def hashes(self, name: str) -> dict[str, str]:
        files = checkpoint.read_manifest(RunDir(self.folder / name).newest_checkpoint())["files"]
        return {file: told["sha256"] for file, told in files.items() if file.endswith(".safetensors")}
    def curve(self, name: str) -> list[list[Any]]:
        """What every step said, the last line of a step counting."""
        told = ("step", "tokens", "loss", "learning_rate", "grad_norm")
        return [[event[what] for what in told] for event in steps(self.folder / name / "events.jsonl")]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(plan: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(1)
    storm = Storm(
        Path(plan["recipe"]), Path(plan["folder"]), plan["processes"], tuple(plan["overrides"]), plan["seed"]
    )
    return storm.weather(plan["kills"], plan["corruptions"])


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
