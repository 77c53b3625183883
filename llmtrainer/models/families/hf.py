"""Every decoder that transformers knows and no family of ours describes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Family


class HuggingFace(Family):
    """A model of transformers' own classes, from `start_from`. Slower than our families, and read the same way:
    packed rows are exact through our attention."""

    apart: bool = False
    """Read every document of a row by itself. Slower, and exact for what packing is refused for: state spaces,
    linear or chunked attention."""

    def build(self, vocabulary: int, compute: torch.dtype = torch.float32) -> nn.Module:
        raise UserError(
            "a model of transformers' classes has no shape of its own here", where="model.kind hf",
            why="its shape and its weights come from a folder", fix="model.start_from=FOLDER",
        )

    def load(self, folder: Path, compute: torch.dtype, *, frozen: bool = False) -> nn.Module:
        from llmtrainer.models.foreign_loading import load_foreign

        return load_foreign(folder, compute, frozen=frozen, apart=self.apart)
