"""Groups of answers that several processes wrote, known to all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from llmtrainer.core.credit import FRESH
from llmtrainer.core.environment import Feedback
from llmtrainer.core.example import Message
from llmtrainer.core.ranks import Ranks
from llmtrainer.core.rollout import Answer, Prompt, Verdict
from llmtrainer.training.answers import Group, joined
from llmtrainer.training.held import Held, packed, unpacked
from llmtrainer.training.turns import Conversation

_TOLD = "words"


def of_all_ranks(own: Sequence[Group], ranks: Ranks) -> list[Group]:
    """The groups of every rank, those of rank 0 first. Of what others wrote, all is known that is learned or told;
    their records are not: rewards have read them."""
    if ranks.world_size == 1:
        return list(own)
    return [group for sent in ranks.gather(_sent(own)) for group in _received(sent)]


def _sent(groups: Sequence[Group]) -> Tensor:
    """Groups as bytes."""
    if not groups:
        return torch.empty(0, dtype=torch.uint8)
    held = Held(0, joined(groups), tuple(one for group in groups for one in group.written))
    words = torch.frombuffer(bytearray(json.dumps([_words(group) for group in groups]).encode()), dtype=torch.uint8)
    return torch.frombuffer(bytearray(save({**packed(held, 0, FRESH), _TOLD: words})), dtype=torch.uint8)


def _received(sent: Tensor) -> list[Group]:
    if not len(sent):
        return []
    tensors = load(sent.numpy().tobytes())
    held, _, _ = unpacked(tensors)
    assert held is not None
    found, first = list[Group](), 0
    for said in json.loads(tensors[_TOLD].numpy().tobytes()):
        found.append(_group(said, held, range(first, first + len(said["texts"]))))
        first += len(said["texts"])
    return found


def _words(group: Group) -> dict[str, Any]:
    """What is no array."""
    return {
        "plain": group.prompt.plain,
        "messages": [[[one.role, one.content] for one in answer.prompt] for answer in group.answers],
        "texts": [answer.text for answer in group.answers],
        "verdicts": {
            name: [[one.value, one.reason, dict(one.parts)] for one in verdicts]
            for name, verdicts in group.verdicts.items()
        },
        "talks": [
            [talk.said, [[one.text, one.role, one.reward, one.error, one.done] for one in talk.heard], talk.end,
             talk.finish, talk.error]
            for talk in group.talks
        ],
    }  # fmt: skip


def _group(said: Mapping[str, Any], held: Held, rows: range) -> Group:
    rollout, part = held.rollout, slice(rows.start, rows.stop)
    messages = [tuple(Message(*one) for one in conversation) for conversation in said["messages"]]
    prompt = Prompt(messages[0], tuple(rollout.prompts[rows[0]].tolist()), plain=said["plain"])
    answers = [
        Answer(asked, text, one.tokens, one.finish)
        for asked, text, one in zip(messages, said["texts"], held.written[part], strict=True)
    ]
    talks = [
        Conversation(
            prompt, rollout.answers[row].tolist(), rollout.weights[row].tolist(), rollout.old_logp[row].tolist(),
            said=texts, heard=[Feedback(done, text, role, reward, error) for text, role, reward, error, done in heard],
            end=end, finish=finish, error=failed,
        )
        for row, (texts, heard, end, finish, failed) in zip(rows, said["talks"], strict=False)    # or none
    ]  # fmt: skip
    verdicts = {name: [Verdict(*one) for one in given] for name, given in said["verdicts"].items()}
    return Group(prompt, held.written[part], tuple(answers), rollout.reward_R[part], verdicts, tuple(talks))
