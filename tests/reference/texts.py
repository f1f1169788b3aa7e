"""Texts to features as plainly as can be: one text at a time, all its tokens, every block written out."""

import torch
from torch import Tensor

from diptych.model.text import TextTransformer


@torch.no_grad()
def encode(tower: TextTransformer, text: Tensor) -> Tensor:
    """Features [N, E] of token rows [N, L]; nothing is shared, cut or sorted."""
    return torch.stack([_encode_one(tower, row) for row in text]) if len(text) else tower.text_projection[:0]


def _encode_one(tower: TextTransformer, row: Tensor) -> Tensor:
    x = tower.token_embedding(row) + tower.positional_embedding[: len(row)]  # [L, D]
    for block in tower.transformer.blocks():
        attn, heads = block.attn, []
        qkv = attn.in_proj(block.ln_1(x)).view(len(row), 3, attn.heads, -1)
        for head in range(attn.heads):
            q, k, v = qkv[:, :, head].unbind(1)
            scores = q @ k.T / q.shape[1] ** 0.5
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            heads.append(scores.softmax(dim=1) @ v)
        x = x + attn.out_proj(torch.cat(heads, dim=1))
        x = x + block.mlp(block.ln_2(x))
    return tower.ln_final(x)[row.argmax()] @ tower.text_projection


def prefixes(text: Tensor) -> set[tuple[int, ...]]:
    """Every beginning of every text, up to its end token: the nodes of a trie."""
    rows = [row[: row.index(max(row)) + 1] for row in text.tolist()]
    return {tuple(row[: length + 1]) for row in rows for length in range(len(row))}
