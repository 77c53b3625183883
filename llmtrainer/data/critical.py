"""Tokens that count more, or less, than others wherever they are learned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Tokenizer


class Critical:
    """alpha of each critical id; every other counts 1."""

    def __init__(self, alphas: Mapping[int, float]) -> None:
        self._ids = np.array(sorted(alphas), dtype=np.int64)
        self._alphas = np.array([alphas[token] for token in sorted(alphas)], dtype=np.float32)
        self.facts = sorted((token, float(alpha)) for token, alpha in alphas.items())
        """What decides the weights of a row, for fingerprints."""

    def counts(self, tokens: NDArray[np.int64], counts: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """How much each token counts, [n], where it counted `counts` (None: 1) before."""
        place = np.searchsorted(self._ids, tokens).clip(max=len(self._ids) - 1)
        found = np.where(self._ids[place] == tokens, self._alphas[place], np.float32(1.0)).astype(np.float32)
        return found if counts is None else found * counts.astype(np.float32)


def critical_of(named: Mapping[str, float], tokenizer: Tokenizer) -> Critical | None:
    """Tokens by name: that of a control token, a text of one token, or `#` and an id. UserError for what is none."""
    alphas: dict[int, float] = {}
    for name, alpha in named.items():
        token = _id_of(name, tokenizer)
        if token in alphas:
            raise UserError(
                f"{name!r} is named twice as a critical token", where="data.critical", why=f"its id is {token:,}",
                fix="keep one of its names",
            )
        alphas[token] = alpha
    return Critical(alphas) if alphas else None


def _id_of(name: str, tokenizer: Tokenizer) -> int:
    if name in tokenizer.control:
        return tokenizer.control[name]
    if name.startswith("#") and name[1:].isdecimal():
        token = int(name[1:])
        if token >= tokenizer.vocabulary:
            raise UserError(
                f"there is no token {token:,}", where="data.critical",
                why=f"the vocabulary has {tokenizer.vocabulary:,}", fix="an id of the vocabulary",
            )
        return token
    ids = tokenizer.encode(name)
    if len(ids) != 1:
        raise UserError(
            f"{name!r} is {len(ids)} tokens and not one", where="data.critical",
            why=f"they are {', '.join(repr(piece) for piece in tokenizer.pieces(ids)[:8]) or 'none'}",
            fix="name one token: its text with the blank before it, a control token, or `#` and its id",
        )
    return ids[0]
