"""Texts as a trie of their tokens: what several texts begin with is computed once.

    a photo of a cat            a photo of a cat <end>
    a photo of a dog     ->                  dog <end>
    a photo of the cat                    the cat <end>

Where attention is causal, keys, values and outputs of a token depend on what stands before it and on nothing else, so
they are the same for all texts that begin alike. The result is exact, not an approximation. For 80 templates and
1,000 class names 12 tokens a text become 4. A tower whose tokens see all others (SigLIP) shares nothing: its rows are
computed whole.

Texts are sorted, so that those that share a beginning are neighbours, and cut into tries of bounded size. In a trie
all linear layers see one row for each token, T in all, without padding; only attention, which is small, works on rows
of texts padded to like length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from diptych.model.clip import TextTower
from diptych.model.config import Precision
from diptych.model.inference.precision import Ready, choose_text_precision, get_ready
from diptych.model.text import TextTransformer
from diptych.model.text_encoder import TransformersText, find_lengths
from diptych.model.transformer import Attention, ResidualAttentionBlock

Rows = NDArray[np.int64]

MAX_TOKENS = 4096
"""Tokens of a trie: enough to fill a matrix product, few enough for the cache."""


@dataclass(frozen=True)
class Group:
    """Texts of a trie that add about as many tokens to it, up to S each; with what they share they are up to L long."""

    own: Int[Tensor, "N S"]
    """For each text the tokens that it adds, the last one repeated."""
    path: Int[Tensor, "N L"]
    """For each text all its tokens from the first one, then any."""
    mask: Float[Tensor, "N 1 S L"]
    """0 where an own token sees one of the path, -inf where not."""


@dataclass(frozen=True)
class Trie:
    """T tokens, each with its place in the text, and N texts that end in it."""

    tokens: Int[Tensor, " T"]
    places: Int[Tensor, " T"]
    ends: Int[Tensor, " N"]
    """The token that each text ends with."""
    groups: Sequence[Group]
    back: Int[Tensor, " T"]
    """Where each token is among the own tokens of all groups, one group after the other."""
    text_back: Int[Tensor, " N"]
    """Where each text is among the texts of all groups."""


def encode_trie(tower: TextTransformer, ready: Ready, trie: Trie) -> Float[Tensor, "N E"]:
    """Features of a trie's texts, not normalised, as the tower itself computes them."""
    x = tower.token_embedding(trie.tokens) + tower.positional_embedding[trie.places]  # [T, D]
    *blocks, last = ready.blocks
    for block in blocks:
        attended = _attend(block.attn, block.ln_1(x).to(ready.dtype), trie.groups)[trie.back]
        x = _finish(block, x, attended, ready.dtype)
    ends = [Group(group.own[:, -1:], group.path, group.mask[:, :, -1:]) for group in trie.groups]
    attended = _attend(last.attn, last.ln_1(x).to(ready.dtype), ends)[trie.text_back]
    x = _finish(last, x[trie.ends], attended, ready.dtype)
    return tower.project(x)


def _finish(
    block: ResidualAttentionBlock, x: Float[Tensor, "M D"], attended: Float[Tensor, "M D"], dtype: torch.dtype
) -> Float[Tensor, "M D"]:
    """The block behind its attention."""
    x = x + block.attn.out_proj(attended)
    return x + block.mlp(block.ln_2(x).to(dtype))


def _attend(attn: Attention, x: Float[Tensor, "T D"], groups: Sequence[Group]) -> Float[Tensor, "M D"]:
    """Attention of the own tokens of all groups, one group after the other."""
    width = x.shape[1]
    qkv = attn.in_proj(x)
    if x.device.type == "cpu":  # for short texts its kernel is quicker in 32 bits than in 16
        qkv = qkv.float()
    q, kv = qkv.split([width, 2 * width], dim=1)
    attended = []
    for group in groups:
        n, length = group.path.shape
        keys, values = (
            kv.index_select(0, group.path.flatten())
            .view(n, length, 2, attn.heads, width // attn.heads)
            .permute(2, 0, 3, 1, 4)
        )  # each [N, A, L, D / A]
        queries = q.index_select(0, group.own.flatten()).view(n, -1, attn.heads, width // attn.heads).transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask.to(q.dtype))
        attended.append(out.transpose(1, 2).reshape(-1, width))
    return torch.cat(attended).to(x.dtype)


def get_text_encoder(tower: TextTower, precision: Precision) -> Callable[[Int[Tensor, "N L"]], Float[Tensor, "N E"]]:
    """The function from tokens to features, not normalised, in a precision."""
    if isinstance(tower, TransformersText):
        return partial(_encode_by_length, tower, precision)
    return partial(encode_texts, tower, get_ready(tower.transformer, precision))


def _encode_by_length(
    tower: TransformersText, precision: Precision, text: Int[Tensor, "N L"], max_tokens: int = MAX_TOKENS
) -> Float[Tensor, "N E"]:
    """Texts of like length together, as the tower itself computes them; in bfloat16 its products are."""
    own = next(tower.parameters())
    lengths = find_lengths(text, tower.config.pad_id)
    order = lengths.argsort(stable=True)
    parts = order.split(max(1, max_tokens // tower.context_length))
    is_half = choose_text_precision(precision, own.device) == "bfloat16" and own.dtype == torch.float32
    with torch.autocast(own.device.type, torch.bfloat16, enabled=is_half):
        features = torch.cat([tower(text[rows].to(own.device)) for rows in parts])
    return features.to(own.dtype)[order.argsort().to(own.device)]


def encode_texts(
    tower: TextTransformer, ready: Ready, text: Int[Tensor, "N L"], max_tokens: int = MAX_TOKENS
) -> Float[Tensor, "N E"]:
    """Features of texts as the tower itself computes them, not normalised.

    Memory is bounded by `max_tokens`, the tokens of a trie or of a batch, beside the rows and their features.
    """
    if not tower.config.is_trimmed:
        parts = text.split(max(1, max_tokens // tower.context_length))
        return torch.cat([_encode_whole(tower, ready, part) for part in parts])
    device = tower.positional_embedding.device
    rows, inverse = sort_rows(text.numpy(force=True), tower.config.end_id)
    features = [encode_trie(tower, ready, move_trie(trie, device)) for trie in build_tries(rows, max_tokens)]
    if not features:
        return tower.project(tower.positional_embedding[:0])
    return torch.cat(features)[torch.from_numpy(inverse).to(device)]


def _encode_whole(tower: TextTransformer, ready: Ready, text: Int[Tensor, "N L"]) -> Float[Tensor, "N E"]:
    """Texts whose padding is seen: whole rows, of the last block the token that is read."""
    text = text.to(tower.positional_embedding.device)
    x, sight = tower.embed(text)
    *blocks, last = ready.blocks
    for block in blocks:
        x = x + block.attn(block.ln_1(x).to(ready.dtype), sight)
        x.add_(block.mlp(block.ln_2(x).to(ready.dtype)))
    token = tower.get_read(text)
    attended = last.attn.read(last.ln_1(x).to(ready.dtype), token, sight)
    x = x[torch.arange(len(x), device=x.device), token] + attended
    return tower.project(x + last.mlp(last.ln_2(x).to(ready.dtype)))


def sort_rows(text: Rows, end_id: int | None = None) -> tuple[Rows, Rows]:
    """Rows without their padding's values, sorted and each once; and for each row of `text` which of them it is.

    A row ends at its end token, or at its highest id, as the tower reads it.
    """
    marks = text if end_id is None else text == end_id
    ends = marks.argmax(axis=1) if text.size else np.zeros(len(text), dtype=np.int64)
    text = np.where(np.arange(text.shape[1]) <= ends[:, None], text, -1)[:, : ends.max(initial=-1) + 1]
    order = np.lexsort(text.T[::-1]) if text.size else np.arange(len(text))
    text = text[order]
    is_new = np.append(np.ones(len(text[:1]), dtype=bool), (text[1:] != text[:-1]).any(axis=1))
    inverse = np.empty(len(order), dtype=np.int64)
    inverse[order] = is_new.cumsum() - 1
    return text[is_new], inverse


def build_tries(rows: Rows, max_tokens: int) -> Iterator[Trie]:
    """Tries of at most `max_tokens` tokens (or of one text), in the order of `rows`, which `sort_rows` made."""
    lengths = (rows >= 0).sum(axis=1)
    shared = np.append(0, (rows[1:] == rows[:-1]).cumprod(axis=1).sum(axis=1))  # tokens shared with the row before
    start, tokens = 0, 0
    for row, length in enumerate(lengths):
        tokens += length - shared[row]
        if tokens > max_tokens and row > start:
            yield _build_trie(rows[start:row], lengths[start:row], shared[start:row])
            start, tokens = row, length
    if start < len(rows):
        yield _build_trie(rows[start:], lengths[start:], shared[start:])


def _build_trie(rows: Rows, lengths: Rows, shared: Rows) -> Trie:
    shared = np.append(0, shared[1:])
    own = lengths - shared
    first = own.cumsum() - own  # the number of each text's first own token
    place = np.arange(lengths.max())
    is_own = (place >= shared[:, None]) & (place < lengths[:, None])  # [N, L]
    # Of all earlier rows that have a token of their own in a place, the last one holds the shared one.
    path = np.maximum.accumulate(np.where(is_own, first[:, None] + place - shared[:, None], 0), axis=0)
    groups, back, texts = [], np.empty(own.sum(), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
    done, done_texts = 0, 0
    for members in _split_by_size(own):
        steps = np.minimum(np.arange(own[members].max()), own[members, None] - 1)  # [N, S]
        mine, seen = first[members, None] + steps, shared[members, None] + steps
        length = lengths[members].max()
        mask = np.where(np.arange(length) <= seen[:, :, None], 0, -np.inf).astype(np.float32)[:, None]
        groups.append(Group(*map(torch.from_numpy, (mine, path[members, :length], mask))))
        back[mine.ravel()[::-1]] = np.arange(done, done + mine.size)[::-1]  # of a repeated token the first
        texts[members] = np.arange(done_texts, done_texts + len(members))
        done, done_texts = done + mine.size, done_texts + len(members)
    tokens, places, ends, back, texts = map(
        torch.from_numpy, (rows[:, : len(place)][is_own], np.nonzero(is_own)[1], first + own - 1, back, texts)
    )
    return Trie(tokens, places, ends, groups, back, texts)


def _split_by_size(own: Rows) -> list[Rows]:
    """The texts of a trie in groups whose numbers of own tokens differ by a fifth at most."""
    size = np.ceil(4 * np.log2(own))
    return [np.flatnonzero(size == each) for each in np.unique(size)]


def move_trie(trie: Trie, device: torch.device) -> Trie:
    """The same trie on a device."""
    groups = [Group(group.own.to(device), group.path.to(device), group.mask.to(device)) for group in trie.groups]
    parts = (trie.tokens, trie.places, trie.ends, trie.back, trie.text_back)
    tokens, places, ends, back, text_back = (part.to(device) for part in parts)
    return Trie(tokens, places, ends, groups, back, text_back)
