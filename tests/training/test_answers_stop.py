"""What fine-tuning is for besides answering: answers end by themselves, because their end token is learned (S5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from llmtrainer.core.example import Example, Message, TokenRow
from llmtrainer.generation.loop import Completion, complete
from llmtrainer.generation.sampling import Sampling
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.training.chats import load_chat
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import open_trainer

TEMPLATES = ["alpaca", "chatml", "completion", "llama2", "mistral", "role_end"]
WORDS = ["ab", "cde", "f", "ghab"]
LENGTHS = range(1, 4)


def records() -> list[dict[str, str]]:
    """`ab 3` is answered by `ab ab ab`: how long an answer is has to be learned."""
    return [
        {"instruction": f"{word} {times}", "input": "", "output": " ".join([word] * times)}
        for word in WORDS for times in LENGTHS
    ]  # fmt: skip


def answers(recipe: Recipe, template: str) -> list[Completion]:
    """Greedy answers to what was learned, after the last step."""
    with open_trainer(recipe) as trainer:
        for _ in trainer.steps():
            pass
        policy = trainer.parts.policy
        policy.eval()
        assert recipe.tokenizer.path is not None
        chat = load_chat(recipe.tokenizer.path, template, None, ())
        prompts = [chat.prompt((Message("user", record["instruction"]),)) for record in records()]
        sampling = Sampling(max_new_tokens=20, temperature=0.0, stop_ids=chat.end_ids)
        return complete(policy, prompts, sampling, chat.tokenizer)


def learning(chats: Callable[..., Recipe], template: str, *overrides: str) -> Recipe:
    return chats(
        records(), template, f"data.template={template}", "data.sequences_per_step=12", "data.tokens_per_batch=2048",
        "model.dropout=0.0", "optim.schedule.peak=1e-2", "duration=40 steps", "save.every=never", *overrides,
    )  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_after_fine_tuning_greedy_answers_end_by_themselves(chats: Callable[..., Recipe], template: str) -> None:
    found = answers(learning(chats, template), template)
    assert {item.finish for item in found} <= {"end", "stop"}
    assert len({len(item.tokens) for item in found}) > 1, "they end where they end, not all at one place"


@pytest.mark.parametrize("template", ["chatml", "completion"])
def test_where_the_end_is_not_learned_no_answer_ends(
    chats: Callable[..., Recipe], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Chat.rows

    def without_ends(self: Chat, example: Example) -> tuple[TokenRow, ...]:
        return tuple(
            replace(row, weights=tuple(
                0.0 if token in self.end_ids else weight for token, weight in zip(row.tokens, row.weights, strict=True)
            ))
            for row in rows(self, example)
        )  # fmt: skip

    monkeypatch.setattr(Chat, "rows", without_ends)
    found = answers(learning(chats, template, "allow=[end_token]"), template)
    assert {item.finish for item in found} == {"length"}
