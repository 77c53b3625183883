"""Batches and a slow, obvious decoder for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llmtrainer.core.batch import Batch
from llmtrainer.models.decoder import Decoder


def rows(
    lengths: Sequence[Sequence[int]], T: int | None = None, vocabulary: int = 320, seed: int = 0
) -> Batch:
    """One row for each list of document lengths, padded on the right; random tokens, every real target counts."""
    random = torch.Generator().manual_seed(seed)
    T = T or max(sum(row) for row in lengths)
    B = len(lengths)
    tokens, targets = (torch.randint(0, vocabulary, (B, T), generator=random) for _ in range(2))
    document, position = torch.full((B, T), -1, dtype=torch.int32), torch.zeros(B, T, dtype=torch.int32)
    sequence = torch.full((B, T), -1, dtype=torch.int32)
    number = 0
    for b, row in enumerate(lengths):
        start = 0
        for d, length in enumerate(row):
            span = slice(start, start + length)
            document[b, span], sequence[b, span] = d, number
            position[b, span] = torch.arange(length, dtype=torch.int32)
            start, number = start + length, number + 1
    return Batch(tokens, targets, (document >= 0).float(), document, position, sequence, torch.arange(B))


def shared_prompt(prompt: int, answers: Sequence[int], seed: int = 0, vocabulary: int = 320) -> Batch:
    """One row: a prompt that several answers share, each answer's positions going on after the prompt."""
    batch = rows([[prompt + sum(answers)]], vocabulary=vocabulary, seed=seed)
    start = prompt
    batch.sequence_BT[:, :prompt] = -1
    for number, length in enumerate(answers):
        batch.sequence_BT[:, start : start + length] = number
        batch.position_BT[:, start : start + length] = torch.arange(prompt, prompt + length, dtype=torch.int32)
        start += length
    return batch


def reference_logits(decoder: Decoder, batch: Batch) -> np.ndarray:
    """Logits [B, T, V] in float64 by numpy, one position and one head at a time, from the published formulas."""
    weights = {name: value.detach().double().numpy() for name, value in decoder.named_parameters()}
    f = decoder.family
    H, K, C = f.heads, f.kv_heads or f.heads, f.head_size or f.hidden_size // f.heads
    R = int(C * f.rotary_share)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + f.norm_epsilon) * weights[name]

    def linear(x, name):
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)

    def turn(x, position):
        out = x.copy()
        for i in range(R // 2):
            angle = position * f.rope_theta ** (-2 * i / R)
            a, b = x[i], x[i + R // 2]
            out[i], out[i + R // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return out

    def sees(b, q, k):
        doc, seq, pos = batch.document_BT[b], batch.sequence_BT[b], batch.position_BT[b]
        same = doc[q] == doc[k] and (seq[k] == -1 or seq[k] == seq[q])
        near = f.sliding_window is None or int(pos[q]) - int(pos[k]) < f.sliding_window
        return k <= q and bool(same) and near

    B, T = batch.tokens_BT.shape
    result = []
    for b in range(B):
        x = weights["model.embed_tokens.weight"][batch.tokens_BT[b].numpy()]
        for layer in range(f.layers):
            here = f"model.layers.{layer}."
            y = norm(x, here + "input_layernorm.weight")
            q, k, v = (linear(y, f"{here}self_attn.{n}_proj").reshape(T, -1, C) for n in "qkv")
            if f.query_key_norm:
                q, k = norm(q, here + "self_attn.q_norm.weight"), norm(k, here + "self_attn.k_norm.weight")
            q, k = (np.array([[turn(h, int(batch.position_BT[b, t])) for h in z[t]] for t in range(T)]) for z in (q, k))
            attended = np.zeros((T, H, C))
            for t in range(T):
                keys = [j for j in range(T) if sees(b, t, j)]
                for h in range(H):
                    score = np.array([q[t, h] @ k[j, h * K // H] / np.sqrt(C) for j in keys])
                    p = np.exp(score - score.max())
                    attended[t, h] = sum(p[i] / p.sum() * v[j, h * K // H] for i, j in enumerate(keys))
            x = x + linear(attended.reshape(T, -1), here + "self_attn.o_proj")
            y = norm(x, here + "post_attention_layernorm.weight")
            gate = linear(y, here + "mlp.gate_proj")
            x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, here + "mlp.up_proj"), here + "mlp.down_proj")
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        result.append(norm(x, "model.norm.weight") @ head.T)
    return np.stack(result)
