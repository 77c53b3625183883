"""What checkpoints cost the loop: tokens a second of a run that saves once a turn, and of one that never does.

The work is that of pretrain.py: a Llama of 27.8 M parameters, steps of 8 rows of 512 tokens. A turn is a number of
whole steps (--steps), of which the first is saved: 333 MB of weights and moments, hashed and forced to the disk, by a
thread beside the steps that follow. A turn ends when the checkpoint is whole.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from sys import executable

import turns
from pretrain import LENGTH, ROWS, prepare
from turns import Figures

MOST = 0.05
"""Share of the loop's time that saving may cost."""


def steps(settings: Figures, saves: bool) -> Iterator[Figures]:
    import torch

    import llmtrainer as lt

    torch.set_num_threads(settings["threads"])
    run = f"run={settings['scratch']}-{'saving' if saves else 'never'}"
    with lt.open_trainer(lt.load(lt.Recipe, settings["recipe"], overrides=[run, "save.keep_newest=1"])) as trainer:
        loop = trainer.steps()
        losses = [next(loop).loss for _ in range(settings["warm"])]
        yield {"first_loss": losses[0]}
        while True:
            started = time.perf_counter()
            for number in range(settings["steps"]):
                next(loop)
                if saves and number == 0:
                    trainer.save()
            trainer.parts.saver.wait()
            yield {"rate": ROWS * LENGTH * settings["steps"] / (time.perf_counter() - started)}


def ours(settings: Figures) -> Iterator[Figures]:
    return steps(settings, saves=True)


def never(settings: Figures) -> Iterator[Figures]:
    return steps(settings, saves=False)


def main() -> None:
    parser = turns.parser(__doc__ or "")
    parser.add_argument("--data", help="text; else this Python's own library")
    parser.add_argument("--steps", type=int, help="of a turn: how often is saved; 20 if quick, else 50")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    wish = parser.parse_args()
    if wish.side:
        turns.serve({"ours": ours, "never": never}[wish.side], wish.settings)
        return
    count = wish.steps or (20 if wish.quick else 50)
    with tempfile.TemporaryDirectory() as scratch:
        settings = prepare(Path(scratch), wish.data, {
            "warm": 2, "steps": count, "compile": not wish.eager, "tokens_per_batch": ROWS * LENGTH,
            "device": wish.device,
        })
        work = f"Llama 27.8M, {ROWS} x {LENGTH} tokens a step, a checkpoint every {count} steps"
        result = turns.in_turn(work, "tokens/s", {"never": Path(executable)}, __file__, settings, wish)
    tokens = ROWS * LENGTH * count
    seconds = tokens / result["ours"] - tokens / result["peers"]["never"]
    turns.tell({**result, "seconds_each": seconds, "first_loss": turns.fact(result, "first_loss"), "most": MOST})


if __name__ == "__main__":
    main()
