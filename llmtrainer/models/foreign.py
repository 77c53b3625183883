"""Models of transformers' own classes as policies: our attention inside them, our head on top of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core import vocab_head
from llmtrainer.core.arrangement import Arranged, Arrangement
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.protocols import Adapter, Head
from llmtrainer.core.randomness import embedding_noise
from llmtrainer.models import foreign_score, paths, scalar
from llmtrainer.models.few_rows import with_few_shapes
from llmtrainer.models.foreign_attention import NOW, Asked, Reading
from llmtrainer.models.foreign_cache import KeyRows, Rows, attend_columns
from llmtrainer.models.lora import Beside, LowRank
from llmtrainer.models.paged import TokenPages
from llmtrainer.models.scalar import ScalarHead


class AdaptedLinear(nn.Linear):
    """torch's linear layer, with room for an adapter."""

    adapter: LowRank | None

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is None:
            return super().forward(x)
        beside, rows = None, x if x.ndim == 3 else x.flatten(0, -2)[None]
        if self.training and self.adapter.rate:
            # transformers' modules carry no places of rows: masks are drawn from the seed of the step.
            key = int(torch.randint(2**62, ()))
            beside = Beside(key, torch.arange(len(rows), device=x.device))
        read: Tensor = self.adapter(rows, self.weight, self.bias, beside)
        return read.view(*x.shape[:-1], -1)

    def merged(self) -> Tensor:
        """The one matrix that does what weight and adapter do."""
        return self.weight.detach() if self.adapter is None else self.adapter.merged(self.weight)


class Foreign(nn.Module):
    """A policy around a model of transformers. Names of parameters are the model's own.

    Trained whole, weights are float32 (or wider) and 16-bit products run under autocast; frozen, they are kept in
    the type that computes.
    """

    def __init__(self, model: Any, compute: torch.dtype, *, apart: bool, frozen: bool) -> None:
        super().__init__()
        self.model = model
        self.compute, self.apart, self.frozen = compute, apart, frozen
        self.adapter: Adapter | None = None
        self.critic: None = None
        """A critic of its own stands beside our own families alone."""
        self.ids: int | None = None
        self.path: str | None = None
        self.chunk: int | None = None
        config = model.config.get_text_config()
        self.context_length = int(
            next(filter(None, (getattr(config, key, None) for key in _CONTEXTS)), 2048)
        )
        self.vocabulary = int(self.head_weight.shape[0])
        self.neftune = 0.0    # size of the noise on embeddings while training
        self.asked = Asked()
        """What the last pass asked of our attention."""
        self.keeps_keys = False
        """Whether reading on from kept keys was proved to be reading the whole."""
        self.angles_change_at: int | None = None
        """The position from which on a text is turned by other angles, all of it; None: there is none."""
        self.own_logits = False
        """Whether the class does more behind its head than a product, so that whole logits are needed."""
        model.get_input_embeddings().register_forward_hook(self._noisy)

    def _noisy(self, embedding: nn.Module, inputs: Any, x_BTD: Tensor) -> Tensor:
        if not self.neftune or not self.training:
            return x_BTD
        batch = NOW.get().batch
        assert isinstance(batch, Batch), "nothing is trained token by token"
        return embedding_noise(x_BTD, self.neftune, batch.dropout_key, batch.document_BT, *batch.places)

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary's head, or the embedding where there is none."""
        weight: Tensor = (self.model.get_output_embeddings() or self.model.get_input_embeddings()).weight
        return weight

    @property
    def worded(self) -> bool:
        """Whether it has the vocabulary's head."""
        return self.model.get_output_embeddings() is not None

    @property
    def score(self) -> ScalarHead | None:
        """The head that gives one number; None: there is none."""
        head = getattr(self.model, "score", None)
        return head if isinstance(head, ScalarHead) else None

    def named_parameters(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters(*arguments, **named)  # type: ignore[no-any-return]

    def named_modules(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, nn.Module]]:
        return self.model.named_modules(*arguments, **named)  # type: ignore[no-any-return]

    def attach(self, head: Head) -> None:
        """Put a score without values in place of the vocabulary's head: the model becomes one of its class for
        sequences with one label. UserError where transformers has none, or for another kind of head."""
        if head.kind != "score":
            raise foreign_score.no_place_for(head)
        self.model = foreign_score.one_label(self.model, torch.promote_types(self.head_weight.dtype, torch.float32))

    def adaptable_layers(self) -> Iterator[tuple[str, AdaptedLinear]]:
        """Every linear layer but the head, by name."""
        head = self.model.get_output_embeddings()
        for name, module in self.model.named_modules():
            if isinstance(module, AdaptedLinear) and module is not head:
                yield name, module

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
        if not set(wants).isdisjoint(scalar.WANTS):
            return scalar.read(self, batch, wants)
        if not self.worded:
            raise scalar.no_words()
        chosen_N = vocab_head.weighted_positions(batch)
        if self.own_logits:
            logits_NV = vocab_head.gather(self._read(batch, logits=True), chosen_N)
            return vocab_head.score_logits(logits_NV, batch, chosen_N, wants, self.ids)
        hidden_ND, weight_VD = self.with_bias(vocab_head.gather(self.hidden(batch), chosen_N))
        return vocab_head.score_gathered(
            hidden_ND, weight_VD, batch, chosen_N, wants, self.chunk, None, self.ids
        )

    def hidden(self, batch: Batch) -> Tensor:
        """What the head reads: [B, T, D] in the compute type."""
        return self._read(batch, logits=False)

    def trunk(self, batch: Batch) -> Tensor:
        return self.hidden(batch)

    def normed(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def words(self, batch: Batch, x_BTD: Tensor, wants: tuple[str, ...]) -> Outputs:
        raise scalar.no_words()    # a score stands in place of the vocabulary's head

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V], for those who read a few places."""
        if self.own_logits:
            return self._read(batch, logits=True)
        hidden, weight_VD = self.with_bias(self.hidden(batch))
        return hidden @ weight_VD.to(hidden.dtype).t()

    def with_bias(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the logits. A bias is the weight of one more input, which is always 1."""
        head = self.model.get_output_embeddings()
        bias_V = getattr(head, "bias", None)
        if bias_V is None:
            return hidden, head.weight
        one = hidden.new_ones(*hidden.shape[:-1], 1)
        return torch.cat([hidden, one], dim=-1), torch.cat([head.weight, bias_V[:, None]], dim=1)

    def _read(self, batch: Batch, logits: bool) -> Tensor:
        if self.adapter is not None:
            self.adapter.require_one()      # gates are known to our own families alone
        if self.angles_change_at is not None and bool((batch.position_BT >= self.angles_change_at).any()):
            return self._read_alone(batch, logits)
        if not self.apart:
            return self._read_rows(with_few_shapes(batch, self.compute), logits)[:, : batch.tokens_BT.shape[1]]
        single, places = _apart(batch)
        place_BT = batch.place_B[:, None].expand(batch.tokens_BT.shape) if batch.place_BT is None else batch.place_BT
        first_N = single.position_BT.flatten()[single.document_BT.flatten() >= 0] == 0
        # Several documents of a row have its place; where each begins tells them apart.
        begins = places[first_N]
        place_B = place_BT.flatten()[begins] + (begins % batch.tokens_BT.shape[1] << 32)
        single = replace(single, dropout_key=batch.dropout_key, place_B=place_B)
        found = self._read_rows(single, logits)
        whole = found.new_zeros(batch.tokens_BT.numel(), found.shape[-1])
        real = single.document_BT.flatten() >= 0
        return whole.index_copy(0, places, found.flatten(0, 1)[real]).unflatten(0, batch.tokens_BT.shape)

    def _read_alone(self, batch: Batch, logits: bool) -> Tensor:
        """Every document in a pass of its own: the class turns all that it reads by the longest of them."""
        found: Tensor | None = None
        for row, start, stop in _spans(batch):
            part = self._read_rows(_part(batch, row, start, stop), logits)[0]
            found = part.new_zeros(*batch.tokens_BT.shape, part.shape[-1]) if found is None else found
            index = torch.arange(start, stop, device=part.device) + row * batch.tokens_BT.shape[1]
            found = found.flatten(0, 1).index_copy(0, index, part).unflatten(0, batch.tokens_BT.shape)
        assert found is not None, "some position is beyond the change, so there is a document"
        return found

    def _read_rows(self, batch: Batch, logits: bool) -> Tensor:
        path = paths.PATHS[self.path or paths.default_for(batch.tokens_BT.device, self.compute)]
        named: dict[str, Any] = {"input_ids": batch.tokens_BT, "use_cache": False}
        if self._takes_positions:
            named["position_ids"] = batch.position_BT.long().clamp(max=self.context_length - 1)
        return self._run(Reading(batch, path, self.compute), named, logits)

    def _run(self, reading: Reading, named: Mapping[str, Any], logits: bool) -> Tensor:
        token = NOW.set(reading)
        try:
            with self._autocast(self.head_weight.device):
                if logits:
                    found: Tensor = self.model(**named).logits
                else:
                    found = self._body(**named).last_hidden_state
        finally:
            NOW.reset(token)
        self.asked = reading.asked
        return found.to(self.compute)

    @property
    def _body(self) -> Any:
        """The model without its head."""
        # A class that is a part of a larger one has no body under the name that it states.
        bodies = (self.model.base_model, getattr(self.model, "model", None), self.model.get_decoder())
        return next(body for body in bodies if body is not None and body is not self.model)

    @property
    def _takes_positions(self) -> bool:
        return not self.apart or "position_ids" in self.model.forward.__code__.co_varnames

    def _autocast(self, device: torch.device) -> AbstractContextManager[None]:
        if self.frozen or self.compute not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute)  # type: ignore[return-value]

    def arrange(self, asked: Arrangement) -> Arranged:
        """Compute as an engine asks. Raises UserError for what only our own families do."""
        for name, given, only in (
            ("kernels", asked.kernels == "liger", "engine.kernels=torch"),
            ("recompute_every", asked.recompute_every is not None, "remove engine.recompute_every"),
        ):
            if given:
                raise UserError(
                    f"engine.{name} is for our own families", where="model.kind hf",
                    why="a class of transformers computes as it is written", fix=only,
                )
        device = self.head_weight.device
        path, told = paths.choose(asked.attention, device, self.compute, asked.fallback)
        self.path = path
        if any(_drops(module) for module in self.model.modules()):
            told += ("dropout inside a class of transformers is drawn from the seed of the step, not of each row",)
        if self.worded and not self.keeps_keys:
            told += (f"{type(self.model).__name__} keeps no keys here: generation reads whole rows for every token",)
        if self.own_logits:
            told += (f"{type(self.model).__name__} does more than a product behind its head: logits exist whole",)
        return Arranged({"attention": f"{path} inside {type(self.model).__name__}"}, told)

    def compile_pieces(self) -> None:
        raise UserError(
            "a class of transformers is not compiled here", where="engine.compile",
            why="our attention inside it decides by each batch what is computed", fix="engine.compile=false",
        )

    def cache(self, rows: int, capacity: int) -> Rows | KeyRows:
        """See Decoder.cache. A class that keeps no keys reads its rows again for every token."""
        if not self.worded:
            raise scalar.no_words()
        return (KeyRows if self.keeps_keys else Rows)(rows, capacity, self.head_weight.device)

    @torch.no_grad()
    def read(self, tokens_BT: Tensor, lengths_B: Tensor, cache: Rows | KeyRows) -> Tensor:
        """See Decoder.read."""
        if isinstance(cache, Rows):
            cache.append(tokens_BT, lengths_B)
            return self._after(cache.tokens)
        device = self.head_weight.device
        seen = cache.append(lengths_B, tokens_BT.shape[1])
        named = {
            "input_ids": tokens_BT.to(device), "use_cache": True, "past_key_values": cache.held,
            "position_ids": seen.position_BT.clamp(min=0, max=self.context_length - 1),
        }
        found = self._run(Reading(seen, attend_columns, self.compute), named, self.own_logits)
        last_BD = found[torch.arange(len(found), device=device), (lengths_B.to(device) - 1).clamp(min=0)]
        if not self.own_logits:
            last_BD, weight_VD = self.with_bias(last_BD)
            last_BD = last_BD @ weight_VD.to(last_BD.dtype).t()
        return last_BD.to(torch.promote_types(self.compute, torch.float32))

    @torch.no_grad()
    def _after(self, rows: list[list[int]]) -> Tensor:
        """Logits [B, V] of what follows each row."""
        last_B = torch.tensor([max(len(row) - 1, 0) for row in rows], device=self.head_weight.device)
        logits_BTV = self.logits(rows_of(rows, self.head_weight.device))
        found: Tensor = logits_BTV[torch.arange(len(last_B), device=last_B.device), last_B]
        return found.to(torch.promote_types(self.compute, torch.float32))

    def reading_weights(self, own: bool = False) -> Foreign:
        """See Decoder.reading_weights."""
        return copy.deepcopy(self) if own else self

    def pages(self, weights: Foreign, count: int, size: int, longest: int) -> TokenPages:
        """See Decoder.pages. Tokens are kept, not keys."""
        return TokenPages(weights._after, count, size, self.head_weight.device)


def _drops(module: nn.Module) -> bool:
    rates = (module.rate if isinstance(module, LowRank) else 0.0, module.p if isinstance(module, nn.Dropout) else 0.0)
    return max(rates) > 0.0


_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def rows_of(documents: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """One document a row, padded to the longest, nothing of it a target."""
    T = max(1, *map(len, documents))
    tokens_BT = torch.tensor([[*ids, *[0] * (T - len(ids))] for ids in documents], device=device)
    real_BT = torch.arange(T, device=device) < torch.tensor([len(ids) for ids in documents], device=device)[:, None]
    owner_BT = torch.where(real_BT, 0, -1).to(torch.int32)
    position_BT = torch.arange(T, dtype=torch.int32, device=device).expand(tokens_BT.shape)
    return Batch(
        tokens_BT, tokens_BT, torch.zeros(tokens_BT.shape, device=device), owner_BT, position_BT, owner_BT,
        torch.arange(len(documents), device=device),
    )  # fmt: skip


def _spans(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """(row, first, stop) of every document."""
    B, T = batch.tokens_BT.shape
    owner_BT = batch.document_BT.tolist()
    for row in range(B):
        start = 0
        for place in range(1, T + 1):
            if place == T or owner_BT[row][place] != owner_BT[row][start]:
                if owner_BT[row][start] >= 0:
                    yield row, start, place
                start = place


def _part(batch: Batch, row: int, start: int, stop: int) -> Batch:
    """A part of a row as a batch."""
    cut = {
        name: value[row : row + 1, start:stop] for name in _BY_PLACE if (value := getattr(batch, name)) is not None
    }
    return replace(batch, **cut, place_B=batch.place_B[row : row + 1], signals={})


_BY_PLACE = ("tokens_BT", "targets_BT", "weights_BT", "document_BT", "position_BT", "sequence_BT", "place_BT")


def _apart(batch: Batch) -> tuple[Batch, Tensor]:
    """Every document of every row as a row of its own, and the flat places [N] that its tokens came from."""
    T, device, spans = batch.tokens_BT.shape[1], batch.tokens_BT.device, list(_spans(batch))
    documents = [batch.tokens_BT[row, start:stop].tolist() for row, start, stop in spans]
    places = [place for row, start, stop in spans for place in range(row * T + start, row * T + stop)]
    return rows_of(documents, device), torch.tensor(places, device=device)
