"""llmtrainer: raw text in, a trained and exactly resumable language model out.

Everything public is a name of this module, resolved when it is first used, so that importing it loads no torch:
`load`, `Recipe` and the config class of every verb, every verb as a function of its config, `open_trainer`,
`load_model`, `load_tokenizer`, `loss_of`, `count`, `UserError`, and the objectives by class.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmtrainer.base.verbs import VERBS
from llmtrainer.base.version import VERSION

if TYPE_CHECKING:
    from llmtrainer.base.config import load as load
    from llmtrainer.base.errors import UserError as UserError
    from llmtrainer.core.objective import count as count
    from llmtrainer.core.objective import loss_of as loss_of
    from llmtrainer.objectives.causal_lm import CausalLM as CausalLM
    from llmtrainer.training.recipe import Recipe as Recipe
    from llmtrainer.training.run import open_trainer as open_trainer
    from llmtrainer.training.run import train as train

__version__ = VERSION

_NAMES = {
    "load": "llmtrainer.base.config",
    "UserError": "llmtrainer.base.errors",
    "count": "llmtrainer.core.objective",
    "loss_of": "llmtrainer.core.objective",
    "Recipe": "llmtrainer.training.recipe",
    "open_trainer": "llmtrainer.training.run",
    "load_model": "llmtrainer.training.models",
    "load_tokenizer": "llmtrainer.training.models",
    "TokenizerTraining": "llmtrainer.training.prepare",
    "Preparation": "llmtrainer.training.prepare",
    "Evaluation": "llmtrainer.training.use",
    "Generation": "llmtrainer.training.use",
    "Plot": "llmtrainer.training.use",
    "Export": "llmtrainer.apps.export",
    "BatchPlanning": "llmtrainer.apps.plan_batches",
    "TokenAddition": "llmtrainer.apps.add_tokens",
    "Merge": "llmtrainer.apps.merge",
    "Inspection": "llmtrainer.apps.inspect",
    "Rank": "llmtrainer.apps.rank",
    "Demo": "llmtrainer.apps.demo",
    "Explanation": "llmtrainer.apps.explain",
    "SchemaRequest": "llmtrainer.apps.schema",
    "Launching": "llmtrainer.apps.launch",
    "Supervision": "llmtrainer.apps.supervise",
    "Stopping": "llmtrainer.apps.stop",
    "DeepspeedConfig": "llmtrainer.apps.deepspeed_config",
    "Examination": "llmtrainer.apps.doctor",
}


def __getattr__(name: str) -> Any:
    verb = VERBS.get(name.replace("_", "-"))
    if verb is not None:
        found: Any = verb.function()
    elif name in _NAMES:
        found = getattr(importlib.import_module(_NAMES[name]), name)
    else:
        found = _objective(name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*_NAMES, *(verb.replace("-", "_") for verb in VERBS), "__version__"])


def _objective(name: str) -> Any:
    if name[:1].isupper():
        from llmtrainer.base.kinds import find_kind, kinds_in

        # By name, as everything here: an import statement would tie this module to torch.
        base: Any = importlib.import_module("llmtrainer.core.objective").Objective
        for kind in kinds_in(base.folder):
            found = find_kind(base, base.folder, kind)
            if found.__name__ == name:
                return found
    raise AttributeError(f"module `llmtrainer` has no `{name}`")
