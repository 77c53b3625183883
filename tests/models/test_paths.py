"""Paths that need a card: what they are given, where they are refused, and the same parity where there is one."""

from __future__ import annotations

import importlib.util
import typing
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.core.protocols import EngineConfig
from llmtrainer.models import attention, flex, paths, varlen
from llmtrainer.models.visible import Visible
from tests.models.rows import rows, shared_prompt
from tests.tolerances import FLOAT32_GRADIENT, FLOAT32_HIDDEN, HALF_RELATIVE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PACKED = rows([[130, 1, 90, 60], [20, 20], [257], []])
BATCHES = {"packed": PACKED, "shared prompt": shared_prompt(60, [50, 100, 30])}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run here: no CUDA device")


def heads(batch: Batch, dtype: torch.dtype = torch.float32, device: torch.device = CPU, C: int = 16) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    B, T = batch.tokens_BT.shape
    made = (torch.randn(B, T, n, C, generator=random).to(device, dtype) for n in (4, 2, 2))
    return [x.requires_grad_() for x in made]


def run(path: str, batch: Batch, window: int | None, *qkv: Tensor) -> list[Tensor]:
    """The output at real tokens, and the gradients of queries, keys and values."""
    out = paths.PATHS[path](*qkv, Visible.of(batch, window))
    real = batch.document_BT >= 0
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out) * real[..., None, None]
    return [out.detach()[real], *torch.autograd.grad(out, qkv, gradient)]


def require_near(path: str, batch: Batch, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
    batch = batch.to(device)
    found = run(path, batch, window, *heads(batch, dtype, device))
    exact = run("reference", batch, window, *heads(batch, torch.float32, device))
    for index, (ours, right) in enumerate(zip(found, exact, strict=True)):
        if dtype == torch.float32:
            allowed = FLOAT32_GRADIENT if index else FLOAT32_HIDDEN
            torch.testing.assert_close(ours, right, rtol=0, atol=allowed)
        else:
            assert float((ours.float() - right).norm() / right.norm()) < HALF_RELATIVE


@pytest.mark.parametrize("window", [None, 17], ids=str)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("path", [name for name in paths.PATHS if name not in ("reference", "varlen", "fused")])
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_every_path_that_runs_on_a_device_equals_the_definition_there(
    path: str, device: str, batch: Batch, window: int | None
) -> None:
    lack = paths.missing(path, torch.device(device), torch.float32)
    if lack is not None:
        pytest.skip(f"not run here: {lack}")
    require_near(path, batch, window, torch.float32, torch.device(device))


@needs_cuda
@pytest.mark.parametrize("window", [None, 17], ids=str)
@pytest.mark.parametrize("batch", [*BATCHES.values(), rows([[200], [200]])], ids=[*BATCHES, "plain"])
def test_fused_kernels_equal_the_definition_for_every_kind_of_batch(batch: Batch, window: int | None) -> None:
    lack = paths.missing("fused", CUDA, torch.bfloat16)
    if lack is not None:
        pytest.skip(f"not run here: {lack}")
    require_near("fused", batch, window, torch.bfloat16, CUDA)


@needs_cuda
def test_flash_kernels_give_the_same_gradients_twice_where_that_is_asked_for() -> None:
    lack = paths.missing("varlen", CUDA, torch.bfloat16)
    if lack is not None:
        pytest.skip(f"not run here: {lack}")
    batch = rows([[700, 900, 400, 48]] * 2).to(CUDA)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (run("varlen", batch, None, *heads(batch, torch.bfloat16, CUDA, 64)) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_cuda
@pytest.mark.parametrize("window", [None, 17], ids=str)
def test_flash_kernels_over_packed_documents_equal_the_definition(window: int | None) -> None:
    lack = paths.missing("varlen", CUDA, torch.bfloat16)
    if lack is not None:
        pytest.skip(f"not run here: {lack}")
    require_near("varlen", PACKED, window, torch.bfloat16, CUDA)


# Stand-ins: the functions that the paths call, written from their documentation.


def flex_by_scores(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, enable_gqa: bool) -> Tensor:
    """flex_attention's contract: [B, H, T, C], scale 1/sqrt(C), what mask_mod says of (row, head, query, key)."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    B, T = q.shape[0], q.shape[2]
    row, query, key = torch.arange(B)[:, None, None], torch.arange(T)[:, None], torch.arange(T)
    seen = block_mask.mask_mod(row, torch.tensor(0), query, key)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=enable_gqa)


def varlen_by_documents(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_k: Tensor, longest: int, longest_k: int,
    *, window_size: tuple[int, int] = (-1, -1), causal: bool = True, **others: Any,
) -> Tensor:
    """Flash attention's contract: [N, H, C] end to end, the window (left, right) without a query's own key."""
    assert bounds.dtype == torch.int32 and torch.equal(bounds, bounds_k) and window_size[1] == 0 and causal
    assert longest == longest_k == int(bounds.diff().max())
    parts = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        far = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (far >= 0) & ((far <= window_size[0]) if window_size[0] >= 0 else True)
        one = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        parts.append(scaled_dot_product_attention(*one, attn_mask=seen, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 1, 17], ids=str)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_flex_is_asked_for_what_may_be_seen(
    batch: Batch, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_operator", lambda compiled: flex_by_scores)
    require_near("flex", batch, window, torch.float32, CPU)


@pytest.mark.filterwarnings("ignore::UserWarning")  # that it is slow so, and what torch says of its own tracing
@pytest.mark.parametrize("window", [None, 17], ids=str)
def test_torchs_own_flex_attention_agrees(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its uncompiled form has a backward on a CPU too; torch only refuses to promise it.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *qkv: None)
    require_near("flex", shared_prompt(30, [40, 70]), window, torch.float32, CPU)


@pytest.mark.parametrize("window", [None, 1, 17], ids=str)
@pytest.mark.parametrize("package", [False, True], ids=["torch", "flash-attn"])
def test_flash_kernels_are_asked_for_every_document_alone(
    package: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen.kernel.cache_clear()
    if package:
        fake = ModuleType("flash_attn")
        fake.flash_attn_varlen_func = varlen_by_documents  # type: ignore[attr-defined]
        monkeypatch.setitem(__import__("sys").modules, "flash_attn", fake)
        monkeypatch.setattr(varlen, "_torch_has_it", lambda: False)
    else:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_documents)
        monkeypatch.setattr(varlen, "_torch_has_it", lambda: True)
    try:
        require_near("varlen", PACKED, window, torch.float32, CPU)
    finally:
        varlen.kernel.cache_clear()


def test_flash_kernels_refuse_a_prompt_with_several_answers() -> None:
    batch = BATCHES["shared prompt"]
    with pytest.raises(UserError, match="several answers") as caught:
        paths.PATHS["varlen"](*heads(batch), Visible.of(batch, None))
    assert "engine.attention=flex" in str(caught.value)


def test_documents_are_bounded_where_they_change_and_where_rows_end() -> None:
    bounds, longest = varlen.documents(Visible.of(rows([[3, 2], [5], [1]]), None))
    assert bounds.tolist() == [0, 3, 5, 10, 11, 15] and longest == 5    # the last four are padding


# Choosing.


def test_the_recipe_knows_every_path_and_auto() -> None:
    named = typing.get_args(EngineConfig.model_fields["attention"].annotation)
    assert set(named) == {"auto", *paths.PATHS} and attention.PATHS.keys() < paths.PATHS.keys()


@pytest.mark.parametrize(
    ("path", "device", "dtype", "said"),
    [
        ("flex", CPU, torch.float32, "no backward on cpu"),
        ("varlen", CPU, torch.bfloat16, "not on cpu"),
        ("varlen", CUDA, torch.float32, "not float32"),
        ("varlen", CUDA, torch.bfloat16, "pip install 'llmtrainer[flash]'"),
    ],
)
def test_a_path_that_cannot_run_is_refused_with_what_is_missing_and_what_can(
    path: str, device: torch.device, dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_torch_has_it", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        paths.choose(path, device, dtype, fallback=False)
    told, default = str(caught.value), "blocks" if device == CPU else "sdpa"
    assert said in told and f"`{path}`" in told and "blocks, sdpa, reference" in told
    assert f"engine.attention={default}" in told
    chosen, (sentence,) = paths.choose(path, device, dtype, fallback=True)
    assert chosen == default and said in sentence and f"`{path}`" in sentence


def test_auto_is_the_devices_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_torch_has_it", lambda: True)
    assert paths.choose("auto", CPU, torch.float32, False) == ("blocks", ())
    assert paths.choose("auto", CPU, torch.bfloat16, False) == ("blocks", ())
    assert paths.choose("auto", CUDA, torch.float32, False) == ("sdpa", ())
    assert paths.choose("auto", CUDA, torch.bfloat16, False) == ("fused", ())
    assert paths.choose("flex", CUDA, torch.float32, False) == ("flex", ())
    monkeypatch.setattr(varlen, "_torch_has_it", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen, (sentence,) = paths.choose("auto", CUDA, torch.bfloat16, False)
    assert chosen == "sdpa" and "mask" in sentence and "pip install 'llmtrainer[flash]'" in sentence


def test_fused_takes_for_each_batch_the_kernel_that_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name, module in (("attend_sdpa", attention), ("attend_varlen", varlen)):
        monkeypatch.setattr(module, name, lambda *qkv, name=name: taken.append(name) or qkv[0])
    for batch, C in ((PACKED, 16), (rows([[30], [40]]), 16), (BATCHES["shared prompt"], 16), (PACKED, 12)):
        paths.attend_fused(*heads(batch, C=C), Visible.of(batch, None))
    assert taken == ["attend_varlen", "attend_sdpa", "attend_sdpa", "attend_sdpa"]
