"""Sample with vLLM, in this process and on this process's device."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from llmtrainer.base.errors import UserError
from llmtrainer.core.randomness import derive
from llmtrainer.core.weights_version import weights_version
from llmtrainer.generation.loop import Finish, Vocabulary, require_prompts
from llmtrainer.generation.sampler import (
    Forward,
    Held,
    Kept,
    Mode,
    Sampled,
    SamplerKind,
    numbered,
    require_trainable,
    scored,
)
from llmtrainer.generation.sampling import Sampling


class Vllm(SamplerKind):
    """vLLM holds a copy of the weights and gets them anew after every step. Its draws are its own: a function of the
    seed and of each answer's number, and others than those of `own`."""

    start_from: str | None = None
    """A Hugging Face folder or a hub id of the policy's own shape, which vLLM opens; its weights are replaced."""

    memory: float = Field(default=0.3, gt=0.0, le=1.0)
    """Share of the device's memory for vLLM, weights included (its gpu_memory_utilization)."""

    max_rows: int = Field(default=256, ge=1)
    """Answers that are written at the same time (its max_num_seqs)."""

    def open(
        self, policy: Any, tokenizer: Vocabulary, forward: Forward, weights: Held = "shared", mode: Mode = "exact"
    ) -> VllmSampler:
        if weights == "shared":
            raise UserError(
                "vLLM cannot read the trainer's own weights", where="rollout.weights",
                why="it has another layout of them, in memory of its own", fix="rollout.weights=copied",
            )
        if self.start_from is None:
            raise UserError(
                "vLLM needs a folder to learn the model's shape from", where="rollout.sampler.start_from",
                why="it builds the model itself", fix="the folder that model.start_from names",
            )
        if getattr(policy, "adapter", None) is not None:
            raise UserError(
                "vLLM gets whole matrices, and this policy has adapters beside them", where="rollout.sampler.kind",
                why="adapters that are not delivered are noticed nowhere", fix="rollout.sampler.kind=own",
            )
        return VllmSampler(self, _imported(), policy, tokenizer, forward, mode)


def _imported() -> Any:
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        raise UserError(
            "vLLM is not installed", where="rollout.sampler.kind", why=str(error),
            fix="pip install 'llmtrainer[vllm]', or rollout.sampler.kind=own",
        ) from None


class VllmSampler:
    """See Sampler."""

    def __init__(
        self, config: Vllm, vllm: Any, policy: Any, tokenizer: Vocabulary, forward: Forward, mode: Mode
    ) -> None:
        self.vllm, self.policy, self.tokenizer, self.forward, self.mode = vllm, policy, tokenizer, forward, mode
        self.llm = vllm.LLM(
            model=config.start_from, skip_tokenizer_init=True, gpu_memory_utilization=config.memory,
            max_num_seqs=config.max_rows, max_model_len=policy.context_length, enable_prefix_caching=True,
            logprobs_mode="processed_logprobs", distributed_executor_backend="external_launcher",
        )  # fmt: skip
        self._version = ""
        self.sync()

    @property
    def version(self) -> str:
        return self._version

    def sync(self) -> None:
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        named = [(name, weight.detach()) for name, weight in self.policy.module.named_parameters()]
        model.load_weights(named)
        self.llm.reset_prefix_cache()    # keys of the old weights would be read with the new ones
        self._version = weights_version(self.policy.module)

    def close(self) -> None:
        self.llm = None

    def sample(
        self, prompts: Sequence[Sequence[int]], each: int, sampling: Sampling, seed: int, *,
        rows: Sequence[int] | None = None,
    ) -> list[Sampled]:  # fmt: skip
        require_trainable(sampling)
        _require_told(sampling)
        require_prompts(prompts, self.policy.context_length, 0)
        asked = [list(prompt) for prompt in prompts for _ in range(each)]
        settings = [self._settings(sampling, seed, number) for number in numbered(len(prompts), each, rows)]
        wanted = [{"prompt_token_ids": row} for row in asked]
        told = self.llm.generate(wanted, sampling_params=settings, use_tqdm=False)
        sampled = [self._sampled(one.outputs[0], sampling) for one in told]
        if self.mode == "fast":
            return sampled
        return scored(self.forward, asked, sampled, len(self.policy.head_weight))

    def _settings(self, sampling: Sampling, seed: int, row: int) -> Any:
        return self.vllm.SamplingParams(
            n=1, temperature=sampling.temperature, max_tokens=sampling.max_new_tokens,
            min_tokens=sampling.min_new_tokens, logprobs=0, detokenize=False,
            stop_token_ids=[self.tokenizer.end, *sampling.stop_ids], seed=derive(seed, "draws", row) % 2**31,
        )  # fmt: skip

    def _sampled(self, output: Any, sampling: Sampling) -> Sampled:
        tokens = tuple(int(token) for token in output.token_ids)
        logp = np.array([told[token].logprob for token, told in zip(tokens, output.logprobs, strict=True)])
        early = min(sampling.min_new_tokens, len(tokens))
        ends = np.array(sorted({self.tokenizer.end, *sampling.stop_ids}), dtype=np.int32)
        kept = (*[Kept(ends, left_out=True)] * early, *[None] * (len(tokens) - early)) if early else None
        # vLLM pads no head: rows that are no id are cut off, and those of the folder's own are drawn from.
        never = np.empty(0, dtype=np.int64)
        return Sampled(
            tokens, self._finish(output), logp, logp, sampling.temperature, never, kept, self._version,
        )  # fmt: skip

    def _finish(self, output: Any) -> Finish:
        if output.finish_reason != "stop":
            return "length"
        return "end" if output.stop_reason in (None, self.tokenizer.end) else "stop"


def _require_told(sampling: Sampling) -> None:
    """UserError where vLLM does not say which ids a token was drawn from."""
    asked = {
        "top_k": sampling.top_k > 0, "top_p": sampling.top_p < 1.0, "min_p": sampling.min_p > 0.0,
        "suppress": bool(sampling.suppress), "stop": bool(sampling.stop),
    }  # fmt: skip
    for name, given in asked.items():
        if given:
            raise UserError(
                f"{name} cannot be sampled with by vLLM in training",
                why="vLLM does not tell which ids were kept, so the trainer could not work out the same log-probability"
                if name != "stop" else "without text, which vLLM is not asked for, it sees no stop string",
                fix=f"remove {name}, or rollout.sampler.kind=own",
            )
