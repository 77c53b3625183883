"""Conversations and, for every built-in template, what it makes of them, written down a second time by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import copysign
from typing import Any

from hypothesis import strategies as st

from llmtrainer.core.example import Message
from llmtrainer.tokenizer.added import with_tokens
from llmtrainer.tokenizer.template import built_in, needed
from llmtrainer.tokenizer.tokenizer import FileTokenizer

Piece = tuple[str, bool, float]
"""Text, whether it is the name of a control token that the template writes, and its weight."""
Truth = Callable[[Sequence[Message]], list[Piece]]


def with_every_token(tokenizer: FileTokenizer) -> FileTokenizer:
    return with_tokens(tokenizer, [name for template in built_in() for name in needed(template)])


def say(text: str, weight: float = 0.0) -> Piece:
    return (text, False, weight)


def name(text: str, weight: float = 0.0) -> Piece:
    return (text, True, weight)


def weight_of(message: Message) -> float:
    """-0.0 for an answer that weighs nothing: equal to 0.0, and known from what is no answer."""
    if message.role != "assistant":
        return 0.0
    return 1.0 if message.weight is None else message.weight or -0.0


def chatml(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        weight = weight_of(message)
        pieces += [name("<|im_start|>"), say(f"{message.role}\n")]
        pieces += [say(message.content, weight), name("<|im_end|>", weight), say("\n")]
    return pieces


def qwen(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        weight = weight_of(message)
        thought = [] if message.thinking is None else [
            name("<think>", weight), say("\n", weight),
            say(message.thinking, weight), say("\n", weight), name("</think>", weight), say("\n\n", weight),
        ]
        pieces += [name("<|im_start|>"), say(f"{message.role}\n"), *thought]
        pieces += [say(message.content, weight), name("<|im_end|>", weight), say("\n")]
    return pieces


def smollm2(messages: Sequence[Message]) -> list[Piece]:
    sentence = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    first = [] if messages[0].role == "system" else [Message("system", sentence)]
    return chatml([*first, *messages])


def role_end(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        weight = weight_of(message)
        pieces += [name("<|im_start|>"), say(message.role), name("<|role_end|>")]
        pieces += [say(message.content, weight), name("<|im_end|>", weight)]
    return pieces


def tags(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        weight = weight_of(message)
        pieces.append(name(f"<{message.role}>"))
        if message.thinking is not None:
            pieces += [name("<think>", weight), say(message.thinking, weight), name("</think>", weight)]
        if message.role == "assistant":
            pieces += [name("<answer>", weight), say(message.content, weight), name("</answer>", weight)]
        else:
            pieces.append(say(message.content))
        pieces.append(name("</s>", weight))
    return pieces


def llama3(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = [name("<|begin_of_text|>")]
    for message in messages:
        weight = weight_of(message)
        pieces += [name("<|start_header_id|>"), say(message.role), name("<|end_header_id|>"), say("\n\n")]
        pieces += [say(message.content, weight), name("<|eot_id|>", weight)]
    return pieces


def alpaca(messages: Sequence[Message]) -> list[Piece]:
    sentence = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    pieces = [say(messages[0].content if messages[0].role == "system" else sentence)]
    for message in messages:
        weight = weight_of(message)
        if message.role == "user":
            pieces.append(say(f"\n\n### Instruction:\n{message.content}"))
        elif message.role == "assistant":
            pieces += [say("\n\n### Response:\n"), say(message.content, weight), name("<|endoftext|>", weight)]
    return pieces


def completion(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        pieces.append(say(message.content, weight_of(message)))
        if message.role == "assistant":
            pieces.append(name("<|endoftext|>", weight_of(message)))
    return pieces


def llama2(messages: Sequence[Message]) -> list[Piece]:
    system, pieces = "", list[Piece]()
    for message in messages:
        weight = weight_of(message)
        if message.role == "system":
            system = f"<<SYS>>\n{message.content}\n<</SYS>>\n\n"
        elif message.role == "user":
            pieces += [name("<|bos|>"), say(f"[INST] {system}{message.content} [/INST]")]
            system = ""
        else:
            pieces += [say(f" {message.content} ", weight), name("<|endoftext|>", weight)]
    return pieces


def mistral(messages: Sequence[Message]) -> list[Piece]:
    system, pieces = "", [name("<|bos|>")]
    for message in messages:
        weight = weight_of(message)
        if message.role == "system":
            system = f"{message.content}\n\n"
        elif message.role == "user":
            pieces.append(say(f"[INST] {system}{message.content}[/INST]"))
            system = ""
        else:
            pieces += [say(f" {message.content}", weight), name("<|endoftext|>", weight)]
    return pieces


TRUTHS: dict[str, Truth] = {
    "alpaca": alpaca, "chatml": chatml, "completion": completion, "llama2": llama2, "llama3": llama3,
    "mistral": mistral, "qwen": qwen, "role_end": role_end, "smollm2": smollm2, "tags": tags,
}
THINKING = ("qwen", "tags")
"""Templates that write reasoning."""


def encoded(tokenizer: FileTokenizer, pieces: Sequence[Piece]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ids and weights of hand-made pieces: a name is its id; text is encoded in one piece as far as one weight goes,
    and cut where an answer begins."""
    tokens: list[int] = []
    weights: list[float] = []
    held, held_weight = "", 0.0

    def close() -> None:
        nonlocal held
        ids = tokenizer.encode(held)
        tokens.extend(ids)
        weights.extend([held_weight] * len(ids))
        held = ""

    for text, is_name, weight in pieces:
        if is_name and text in tokenizer.control:
            close()
            tokens.append(tokenizer.control[text])
            weights.append(weight)
            continue
        if (weight, copysign(1.0, weight)) != (held_weight, copysign(1.0, held_weight)):
            close()
        held, held_weight = held + text, weight
    close()
    return tuple(tokens), tuple(weights)


def conversations(names: Sequence[str], *, thinking: bool = False, system: bool = True) -> st.SearchStrategy[Any]:
    """Turns of user and assistant, with texts that hold the names of control tokens, blanks at their ends, other
    scripts, or nothing; some answers weigh nothing or half; the last turn may have no answer."""
    words = st.sampled_from([
        *names, "hello", "two words", "  ", "\n", "\u6625\u7720\u4e0d\u89c9\u6653", "\U0001f600", "a\u0301", "<|im_",
        "start|>", "[INST]", "### Response:\n", "x" * 40, "<", "|>", "12345", "\t", "</", "user", "assistant\n",
    ])
    text = st.one_of(st.lists(words, max_size=5).map("".join), st.text(max_size=12))
    weight = st.sampled_from([None, None, None, 0.0, 0.5, 1.0])
    thought = st.one_of(st.none(), text) if thinking else st.none()
    user = text.map(lambda said: Message("user", said))
    answer = st.builds(lambda said, thinks, w: Message("assistant", said, thinks, weight=w), text, thought, weight)
    turns = st.lists(st.tuples(user, answer), min_size=1, max_size=4)
    first = st.one_of(st.none(), text) if system else st.none()

    def put(said: str | None, pairs: Sequence[tuple[Message, Message]], open_turn: bool) -> tuple[Message, ...]:
        messages = [] if said is None else [Message("system", said)]
        messages += [message for pair in pairs for message in pair]
        return tuple([*messages, Message("user", "and now?")] if open_turn else messages)

    return st.builds(put, first, turns, st.booleans())
