"""vLLM behind the seam, against a module that stands in for it: nothing here has run on vLLM itself."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.weights_version import weights_version
from llmtrainer.generation.sampler import require_version
from llmtrainer.generation.samplers.vllm import Vllm, VllmSampler
from llmtrainer.generation.sampling import Sampling
from tests.generation.test_loop import END, Tokens
from tests.generation.test_sampler import decoder, stepped

PROMPTS = [[5, 6], [7]]


@dataclass
class FakeVllm:
    """Answers with the prompt's last id, as often as it was sampled in order, then the end."""

    asked: dict[str, Any] = field(default_factory=dict)
    loaded: dict[str, torch.Tensor] = field(default_factory=dict)
    wanted: list[tuple[list[int], dict[str, Any]]] = field(default_factory=list)
    forgotten: int = 0

    def module(self) -> ModuleType:
        made: Any = ModuleType("vllm")
        made.SamplingParams = lambda **settings: settings
        made.LLM = self.llm
        return made  # type: ignore[no-any-return]

    def llm(self, **asked: Any) -> Any:
        self.asked = asked
        model = SimpleNamespace(load_weights=self.load)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        return SimpleNamespace(llm_engine=engine, generate=self.generate, reset_prefix_cache=self.forget)

    def load(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.loaded = {name: weight.clone() for name, weight in named}

    def forget(self) -> None:
        self.forgotten += 1

    def generate(self, wanted: list[dict[str, Any]], sampling_params: list[dict[str, Any]], use_tqdm: bool) -> Any:
        self.wanted = list(zip([one["prompt_token_ids"] for one in wanted], sampling_params, strict=True))
        told = []
        for number, (prompt, _) in enumerate(self.wanted):
            tokens = [prompt[-1]] * number + [END]
            logprobs = [{token: SimpleNamespace(logprob=-float(place + 1))} for place, token in enumerate(tokens)]
            output = SimpleNamespace(
                token_ids=tokens, logprobs=logprobs, finish_reason="stop" if number else "length",
                stop_reason=END if number == 1 else None if number == 2 else 9,
            )  # fmt: skip
            told.append(SimpleNamespace(outputs=[output]))
        return told


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake.module())
    return fake


def opened(policy: Any, mode: Any = "fast") -> VllmSampler:
    return Vllm(start_from="folder").open(policy, Tokens(vocabulary=60), policy, "copied", mode)


def test_answers_come_in_order_with_the_ids_and_numbers_that_it_told(vllm: FakeVllm) -> None:
    sampled = opened(decoder()).sample(PROMPTS, 2, Sampling(max_new_tokens=9, temperature=0.5), 3)
    assert [one.tokens for one in sampled] == [(END,), (6, END), (7, 7, END), (7, 7, 7, END)]
    assert [one.finish for one in sampled] == ["length", "end", "end", "stop"]
    assert sampled[2].logp.tolist() == [-1.0, -2.0, -3.0] and sampled[0].kept is None
    assert [prompt for prompt, _ in vllm.wanted] == [[5, 6], [5, 6], [7], [7]]
    assert vllm.asked["logprobs_mode"] == "processed_logprobs" and vllm.asked["max_model_len"] == 96


def test_draws_are_a_function_of_the_seed_and_the_row_however_prompts_are_cut(vllm: FakeVllm) -> None:
    sampler, sampling = opened(decoder()), Sampling(max_new_tokens=9)
    sampler.sample(PROMPTS, 2, sampling, 3)
    seeds = [settings["seed"] for _, settings in vllm.wanted]
    sampler.sample(PROMPTS[1:], 2, sampling, 3, rows=[2])
    assert [settings["seed"] for _, settings in vllm.wanted] == seeds[2:] and len(set(seeds)) == 4
    sampler.sample(PROMPTS, 2, sampling, 4)
    assert not {settings["seed"] for _, settings in vllm.wanted} & set(seeds)


def test_it_gets_the_weights_at_every_sync_and_a_skipped_one_is_noticed(vllm: FakeVllm) -> None:
    policy, sampling = decoder(), Sampling(max_new_tokens=9)
    sampler = opened(policy)
    stepped(policy)
    with pytest.raises(UserError, match="does not hold the trainer's weights"):
        require_version(sampler.sample(PROMPTS, 1, sampling, 3), weights_version(policy))
    sampler.sync()
    require_version(sampler.sample(PROMPTS, 1, sampling, 3), weights_version(policy))
    for name, weight in policy.named_parameters():
        assert torch.equal(vllm.loaded[name], weight)
    assert vllm.forgotten == 2


def test_in_exact_mode_the_numbers_are_the_trainers_own(vllm: FakeVllm) -> None:
    policy = decoder()
    (first, *_) = opened(policy, "exact").sample(PROMPTS, 2, Sampling(max_new_tokens=9), 3)
    logits_V = policy.read(torch.tensor([[5, 6]]), torch.tensor([2]), policy.cache(1, 2))[0]
    assert first.logp[0] == pytest.approx(float(logits_V.log_softmax(0)[END]), abs=1e-10)
    assert first.sampled_logp[0] == -1.0


def test_before_the_least_length_the_ends_were_no_choice(vllm: FakeVllm) -> None:
    sampled = opened(decoder()).sample(PROMPTS, 2, Sampling(max_new_tokens=9, min_new_tokens=2, stop_ids=(11,)), 3)
    bits = sampled[2].kept_bits(64)
    assert bits is not None
    flags = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)
    assert [np.flatnonzero(~row).tolist() for row in flags] == [[END, 11], [END, 11], []]


@pytest.mark.parametrize(
    "setting", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"suppress": (9,)}, {"stop": ("A",)},
                {"repetition_penalty": 1.2}], ids=str,
)  # fmt: skip
def test_what_it_does_not_tell_is_refused_by_name(vllm: FakeVllm, setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        opened(decoder()).sample(PROMPTS, 1, Sampling.model_validate(setting), 3)
    assert vllm.wanted == []


def test_shared_weights_adapters_and_a_missing_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = decoder()
    with pytest.raises(UserError, match=r"trainer's own weights"):
        Vllm(start_from="folder").open(policy, Tokens(), policy, "shared")
    with pytest.raises(UserError, match="folder"):
        Vllm().open(policy, Tokens(), policy, "copied")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="not installed"):
        opened(policy)
    policy.adapter = object()  # type: ignore[assignment]
    with pytest.raises(UserError, match="adapters"):
        opened(policy)
