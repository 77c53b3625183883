"""Words on a command line -> a function of one config. Holds no logic of any verb, and no torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import TextIO

from llmtrainer.base import outcome
from llmtrainer.base.errors import DEFECT, DONE, MENDABLE, STOPPED, RunStopped, UserError
from llmtrainer.base.process import launched, rank, record_collectives, wait_passively
from llmtrainer.base.verbs import VERBS, Verb, verb_named
from llmtrainer.base.version import VERSION

INTERRUPTED = 128 + 2
"""What a shell expects of a process that Ctrl-C ended."""


USAGE = "llmtrainer VERB [FILE.yaml] [WORDS] [key=value | --key value ...] [--json] [--quiet] [-- WORDS]"


def run() -> None:
    """The console script."""
    wait_passively()
    record_collectives()
    outcome.begin()
    code = main(sys.argv[1:])
    # To torchrun any other code is a failure, for which it ends the other ranks, one that still saves among them.
    sys.exit(DONE if code == STOPPED and launched() else code)


def main(arguments: Sequence[str]) -> int:
    """Do what the words say; what is returned is the exit code."""
    words = list(arguments)
    before, rest = _until_dashes(words)
    as_json = "--json" in before
    quiet = "--quiet" in before
    before = [word for word in before if word not in ("--json", "--quiet")]
    name = next((word for word in before if not word.startswith("-")), "")
    try:
        with _stdout_for_the_result(as_json) as out:
            return _act(before, rest, as_json, quiet, out)
    except UserError as error:
        parts = {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}
        return _report(MENDABLE, name, error, str(error), as_json, **parts)
    except RunStopped as error:
        return _report(STOPPED, name, error, str(error), as_json, what=str(error))
    except KeyboardInterrupt as error:
        return _report(INTERRUPTED, name, error, "interrupted", as_json, what="interrupted")
    except BrokenPipeError:
        # Whoever read us has enough (`| head`). Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:      # the last line of defence: a defect must not look like a user's mistake
        what = f"a defect of ours: {type(error).__name__}: {error}"
        return _report(DEFECT, name, error, what, as_json, what=what)


def _act(before: list[str], rest: list[str], as_json: bool, quiet: bool, out: TextIO) -> int:
    """One command line, `--json` and `--quiet` taken off; `rest` begins with `--` or is empty."""
    if not before or before[0] in ("--help", "-h", "help"):
        print(overview(), file=out)
        return DONE
    if before[0] == "--version":
        print(json.dumps({"version": VERSION}) if as_json else f"llmtrainer {VERSION}", file=out)
        return DONE
    name, *words = before
    verb = verb_named(name)
    if "--help" in words or "-h" in words:
        print(_help(name, verb), file=out)
        return DONE

    from llmtrainer.base.config import load, sorted_words
    from llmtrainer.training.console import voice

    function, config_type = verb.function(), verb.config_type()
    file, overrides, bare = sorted_words(config_type, [*words, *rest])
    with voice(quiet=quiet, json=as_json):
        result = function(load(config_type, file, overrides, bare))
    figures, told = result.json(), result.text()
    outcome.end(result.exit_code, told, result=figures)
    text = json.dumps(figures, ensure_ascii=False, allow_nan=False) if as_json else told
    if text and rank() == 0 and not launched():
        print(text, file=out, flush=True)
    return result.exit_code


def overview() -> str:
    """What `llmtrainer --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.purpose}" for name, verb in VERBS.items()]
    return "\n".join([
        "Trains language models: raw text in, a trained and exactly resumable model out.",
        "", f"usage: {USAGE}", "", *lines, "",
        "`key=value` and `--key value` set what `llmtrainer VERB --help` lists, over what the file says.",
        "--json prints one JSON object on stdout; --quiet leaves out progress; --version; words after -- are",
        "never overrides. Exit codes: 0 done, 2 to be mended by you, 3 stopped on request, 1 a defect of ours.",
        "", "Begin with `llmtrainer demo`.",
    ])


def _help(name: str, verb: Verb) -> str:
    from llmtrainer.base.explain import help_lines

    config_type = verb.config_type()
    takes = " ".join(word.upper() for word in config_type.words)
    examples = [f"  llmtrainer {example}" for example in verb.examples]
    return "\n".join([
        f"llmtrainer {name}: {verb.purpose}.",
        "", f"usage: llmtrainer {name} [FILE.yaml] {takes}".rstrip() + " [key=value ...]",
        "", "for example", *examples, "", "keys, their defaults and what they mean", *help_lines(config_type),
    ])


@contextlib.contextmanager
def _stdout_for_the_result(as_json: bool) -> Iterator[TextIO]:
    """The real stdout; with --json, whatever else is printed goes to stderr while the verb works."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield out


def _report(
    code: int, name: str, raised: BaseException, text: str, as_json: bool, **error: str | None
) -> int:
    """An error for people on stderr and, with --json, as the one object on stdout. Of a job that was launched, the
    launcher says it, once."""
    outcome.end(code, text, error={**error, **outcome.described(raised)})
    if launched():
        return code
    print(f"llmtrainer {name}: {text}" if name else f"llmtrainer: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": error}, ensure_ascii=False), flush=True)
    if code == DEFECT:
        traceback.print_exception(raised)
    return code


def _until_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place:]
