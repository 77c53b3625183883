"""Text from one model, by llmtrainer and by transformers.generate: tokens a second.

The work: SmolLM2-135M-Instruct in bfloat16, 16 short prompts, 64 new tokens each, drawn at temperature 1 from all
ids; the end is not chosen before. Reading the prompts counts, loading the model and splitting texts does not.

With --rollout, what reinforcement learning asks for: 8 longer questions, 16 answers to each, which end where the model
ends them, after 96 tokens at the latest. Ours is the sampler of a rollout, with half of the answers at a time.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import smollm2
import turns
from turns import Figures

PROMPTS = [f"What is {n} + {7 * n + 3}? Answer with the number." for n in range(16)]
NEW = 64
QUESTIONS, EACH, ROWS, LONGEST = 8, 16, 64, 96
"""Of a rollout: prompts, answers to each, answers at the same time (ours), tokens of the longest answer."""
WORKED = "\n".join(f"{n} plates with {n + 3} plums each hold {n * (n + 3)} plums in all." for n in range(3, 9))
COMPARED = 64
"""Logits of so many ids after each prompt are compared, to see that both sides run one model."""
LARGEST_DIFFERENCE = 0.5
"""Two bfloat16 implementations differ by a few steps of 1/8 in logits of 16 to 32; another model by far more."""


def ours(settings: Figures) -> Iterator[Figures]:
    import torch

    torch.set_num_threads(settings["threads"])
    from llmtrainer.generation.loop import complete
    from llmtrainer.generation.sampling import Sampling
    from llmtrainer.training.models import open_model

    opened = open_model(settings["model"], settings["precision"], settings["device"])
    policy, tokenizer = opened.policy, opened.tokenizer
    prompts = tokenizer.encode_batch(PROMPTS)
    kept = policy.cache(len(prompts), max(map(len, prompts)))    # with its copy of the weights, as a server has it
    tokens_BT = torch.tensor([ids + [0] * (max(map(len, prompts)) - len(ids)) for ids in prompts])
    tokens_BT = tokens_BT.to(settings["device"])
    logits_BV = policy.read(tokens_BT, torch.tensor([len(ids) for ids in prompts]), kept)
    sampling = Sampling(max_new_tokens=NEW, min_new_tokens=NEW)

    def write(seed: int) -> int:
        return sum(len(one.tokens) for one in complete(policy, prompts, sampling, tokenizer, seed=seed))

    yield from _turns(settings, write, prompts, logits_BV)


def transformers(settings: Figures) -> Iterator[Figures]:
    import torch

    torch.set_num_threads(settings["threads"])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["precision"])).eval()
    model = model.to(settings["device"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    read = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    read = read.to(settings["device"])
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(read["input_ids"], read["attention_mask"], strict=True)]
    with torch.inference_mode():
        logits_BV = model(**read).logits[:, -1].float()

    def write(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.inference_mode():
            written = model.generate(
                **read, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            )
        return int(written[:, read["input_ids"].shape[1] :].numel())

    yield from _turns(settings, write, prompts, logits_BV)


def question(number: int) -> str:
    """One turn of a chat, as the model's template writes it."""
    asked = f"{WORKED}\nHow many plums do {number + 9} plates with {number + 2} plums each hold? Explain it."
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


def ours_rollout(settings: Figures) -> Iterator[Figures]:
    import torch

    torch.set_num_threads(settings["threads"])
    from llmtrainer.generation.samplers.own import Own
    from llmtrainer.generation.sampling import Sampling
    from llmtrainer.training.models import open_model

    opened = open_model(settings["model"], settings["precision"], settings["device"])
    policy, tokenizer = opened.policy, opened.tokenizer
    start, end = (tokenizer.control[name] for name in ("<|im_start|>", "<|im_end|>"))
    marks = {"<|im_start|>": start, "<|im_end|>": end}
    prompts = []
    for number in range(QUESTIONS):
        parts = re.split(r"(<\|im_(?:start|end)\|>)", question(number))
        prompts.append([one for part in parts if part for one in ([marks[part]] if part in marks
                                                                  else tokenizer.encode(part))])
    weights = policy.reading_weights()    # kept, as a trainer keeps them for all the rollouts of a step
    tokens_BT = torch.tensor([ids + [0] * (max(map(len, prompts)) - len(ids)) for ids in prompts])
    tokens_BT = tokens_BT.to(settings["device"])
    lengths_B = torch.tensor([len(ids) for ids in prompts])
    logits_BV = policy.read(tokens_BT, lengths_B, policy.cache(len(prompts), max(map(len, prompts))))
    sampler = Own(max_rows=ROWS).open(policy, tokenizer, policy, "shared", "fast")
    sampling = Sampling(max_new_tokens=LONGEST, stop_ids=(end,))

    def write(seed: int) -> int:
        return sum(len(one.tokens) for one in sampler.sample(prompts, EACH, sampling, seed))

    for told in _turns(settings, write, prompts, logits_BV):
        if "rate" in told and settings["use_cpu"]:    # the layers are packed for a processor alone
            told["linear_rate"] = linear_rate(weights, ROWS)
            told["linear_share"] = told["rate"] / told["linear_rate"]
        yield told


def linear_rate(weights: Any, rows: int) -> float:
    """Tokens a second that go through the prepacked linear layers and the head alone, so many at a time."""
    import torch

    def once() -> None:
        for layer in weights.layers:
            layer.output(layer.queries_keys_values(x_ND)[:, : layer.shape.heads * layer.shape.head_size].contiguous())
            gate_NF, _ = layer.gate_up(x_ND).chunk(2, dim=-1)
            layer.down(gate_NF.contiguous())
        weights.head(x_ND)

    x_ND = torch.randn(rows, weights.embedding_VD.shape[1]).to(weights.compute)
    seconds = []
    with torch.no_grad():
        for _ in range(12):
            started = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - started)
    return rows / statistics.median(seconds[2:])


def transformers_rollout(settings: Figures) -> Iterator[Figures]:
    import torch

    torch.set_num_threads(settings["threads"])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["precision"])).eval()
    model = model.to(settings["device"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    read = tokenizer([question(number) for number in range(QUESTIONS)], return_tensors="pt", padding=True)
    read = read.to(settings["device"])
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(read["input_ids"], read["attention_mask"], strict=True)]
    with torch.inference_mode():
        logits_BV = model(**read).logits[:, -1].float()

    def write(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.inference_mode():
            written = model.generate(
                **read, max_new_tokens=LONGEST, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                num_return_sequences=EACH, eos_token_id=[end, tokenizer.eos_token_id],
            )
        answers = written[:, read["input_ids"].shape[1] :].tolist()
        ends = {end, tokenizer.eos_token_id}
        return sum(next((n + 1 for n, one in enumerate(ids) if one in ends), len(ids)) for ids in answers)

    yield from _turns(settings, write, prompts, logits_BV)


def _turns(settings: Figures, write: Any, prompts: list[list[int]], logits_BV: Any) -> Iterator[Figures]:
    every = logits_BV.shape[1] // COMPARED
    write(0)
    yield {"prompts": prompts, "logits": logits_BV[:, : every * COMPARED : every].float().tolist()}
    seed = 0
    while True:
        started, busy, tokens = time.perf_counter(), time.process_time(), 0
        for _ in range(settings["batches"]):
            seed += 1
            tokens += write(seed)
        wall, busy = time.perf_counter() - started, time.process_time() - busy
        yield {"rate": tokens / wall, "per_processor_second": tokens / busy}


def difference(told: Figures) -> float:
    """The largest difference between the sides' logits after the prompts. SystemExit if it is not one work."""
    mine, theirs = told["ours"], told["transformers"]
    if mine["prompts"] != theirs["prompts"]:
        turns.refuse("the sides read other ids", "compare the tokenizers of the model's folder")
    found = max(
        abs(a - b)
        for mine_V, theirs_V in zip(mine["logits"], theirs["logits"], strict=True)
        for a, b in zip(mine_V, theirs_V, strict=True)
    )
    if found > LARGEST_DIFFERENCE:
        turns.refuse(f"the sides' logits differ by {found:.3f}", "this is not one model: look at its folder")
    return found


def main() -> None:
    parser = turns.parser(__doc__ or "")
    parser.add_argument("--rollout", action="store_true", help="several answers to each of some longer questions")
    parser.add_argument("--model", type=Path, default=os.environ.get("SMOLLM2"), help="folder of SmolLM2-135M")
    wish = parser.parse_args()
    if wish.side:
        works = {"ours": ours, "transformers": transformers}
        if wish.settings["rollout"]:
            works = {"ours": ours_rollout, "transformers": transformers_rollout}
        turns.serve(works[wish.side], wish.settings)
        return
    wish.model = smollm2.folder_of(wish.model, wish.peer_python)
    batches = (2 if wish.quick else 4) // (2 if wish.rollout else 1)
    settings = {"model": str(wish.model), "batches": batches, "rollout": wish.rollout}
    work = f"SmolLM2-135M, {len(PROMPTS)} prompts, {NEW} new tokens each, temperature 1, all ids"
    if wish.rollout:
        work = f"SmolLM2-135M, {EACH} answers to each of {QUESTIONS} questions, up to {LONGEST} tokens"
    result = turns.in_turn(work, "tokens/s", {"transformers": wish.peer_python}, __file__, settings, wish)
    turns.tell({**result, "largest_logit_difference": difference(result["facts"]), "threads": wish.threads})


if __name__ == "__main__":
    main()
