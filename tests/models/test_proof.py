"""What is wrong on this machine is found before the first step, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.arrangement import Arrangement
from llmtrainer.models import decoder as decoder_module
from llmtrainer.models import kernels, paths, proof
from llmtrainer.models.attention import attend_blocks
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.layers import TORCH
from llmtrainer.models.visible import Visible
from tests.models.rows import rows

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def decoder(dtype: torch.dtype = torch.float32, **fields: Any) -> Decoder:
    made = Llama(hidden_size=64, layers=1, heads=4, kv_heads=2, **fields).build(320, dtype)
    made.initialise(0)
    return made


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.2


def sees_one_more(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    window = None if visible.window is None else visible.window + 1
    return attend_blocks(q, k, v, Visible(visible.document_BT, visible.sequence_BT, visible.position_BT, window))


def crosses_documents(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    one = visible.document_BT.clamp(max=0)
    return attend_blocks(q, k, v, Visible(one, one, visible.position_BT, visible.window))


def mixes_heads(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    return attend_blocks(q, k.flip(2), v.flip(2), visible)


def wrong_gradient_of_keys(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    return attend_blocks(q, _WrongBackward.apply(k), v, visible)


def not_a_number(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    return attend_blocks(q, k, v, visible) * float("nan")


def stops(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    raise LookupError("no kernel image\nfor this device")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("window", [None, 20], ids=str)
def test_right_paths_and_kernels_pass_in_every_type(dtype: torch.dtype, window: int | None) -> None:
    model = decoder(dtype, sliding_window=window)
    for path in ("auto", "blocks", "sdpa", "reference"):
        told = model.arrange(Arrangement(attention=path))
        assert told.facts == {"attention": "blocks" if path == "auto" else path, "kernels": "torch"}
        assert not told.fallbacks


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (sees_one_more, "the result is off"), (crosses_documents, "the result is off"),
        (mixes_heads, "the result is off"), (wrong_gradient_of_keys, "the gradient of input 2 is off"),
        (not_a_number, "off by nan"), (stops, "LookupError: no kernel image;"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_path_is_refused_by_name_with_the_paths_that_are_right(
    wrong: Callable[..., Tensor], said: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(paths.PATHS, "sdpa", wrong)
    model = decoder(dtype, sliding_window=20)
    with pytest.raises(UserError) as caught:
        model.arrange(Arrangement(attention="sdpa"))
    told = str(caught.value)
    assert "`sdpa`" in told and "cpu" in told and said in told and "within bounds: blocks, reference" in told
    assert "engine.attention=blocks" in told and model.path is None
    if "off" in said:
        assert f"{proof.ALLOWED[dtype]:.0e} is allowed" in told


@pytest.mark.parametrize("part", ["norm", "rotate", "gated"])
def test_a_wrong_kernel_is_refused_by_name(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(TORCH, part)

    def wrong(*inputs: Any) -> Any:
        found = right(*inputs)
        return tuple(map(_WrongBackward.apply, found)) if part == "rotate" else _WrongBackward.apply(found)

    monkeypatch.setattr(kernels, "TORCH", TORCH._replace(**{part: wrong}))
    with pytest.raises(UserError, match="by `torch` kernels") as caught:
        decoder().arrange(Arrangement())
    assert "the gradient of input 1 is off" in str(caught.value)


def test_the_proof_draws_no_random_number_and_leaves_the_model_alone() -> None:
    model = decoder()
    before, weights = torch.random.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    model.arrange(Arrangement())
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("piece", ["project", "finish", "_reduce", "_differentiate_at_once"])
def test_a_wrong_compiled_piece_is_refused_at_the_first_step(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(part: Any, dynamic: bool, mode: str | None = None) -> Any:
        if part.__name__ != piece:
            return part

        def wrong(*inputs: Any) -> Any:
            found = part(*inputs)
            if piece == "finish":
                return _WrongBackward.apply(found)
            if piece == "_differentiate_at_once":
                return inputs[0].mul_(1.5)
            return (found[0] * 1.5, *found[1:])

        return wrong

    monkeypatch.setattr(torch, "compile", compiler)
    model, batch = decoder(), rows([[9, 4], [12]])
    model.compile_pieces()
    with pytest.raises(UserError, match=r"torch\.compile makes something else") as caught:
        model(batch, ("logp",)).logp_BT.sum().backward()
    assert "engine.compile=false" in str(caught.value)


@pytest.mark.parametrize("trained", ["lm_head", "layers.0.mlp", "layers.0.self_attn.q_proj"])
def test_pieces_are_proven_in_a_model_that_is_frozen_in_part(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda part, **_: part)
    model = decoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    model.compile_pieces()
    model(rows([[9, 4], [12]]), ("logp",)).logp_BT.sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_pieces_are_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda part, **_: part)
    seen: list[str] = []
    monkeypatch.setattr(decoder_module.proof, "require_same", lambda what, *others: seen.append(what))
    monkeypatch.setattr(proof, "_require_near", lambda what, *others: seen.append(what))
    model, batch = decoder(), rows([[9, 4], [12]])
    model.compile_pieces()
    with torch.no_grad():
        model(batch, ("logp",))
    assert seen == ["log-probabilities"], "an evaluation has no backward to prove"
    for _ in range(2):
        model(batch, ("logp",)).logp_BT.sum().backward()
    assert seen == [
        "log-probabilities", "what precedes attention", "what follows attention", "the gradient of log-probabilities"
    ]
