"""The text tower: a causal Transformer whose feature is read at the end token (paper section 2.4)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.model.config import Activation, TextConfig
from diptych.model.transformer import Transformer

MAX_GROUPS, MIN_GROUP = 8, 64
"""Into how many groups of like length a batch is split at most, and how many texts a group has at least."""


class TextTransformer(nn.Module):
    """Tokens [N, L] -> text features [N, E], not normalised. L may be anything up to `context_length`."""

    def __init__(self, config: TextConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        self.context_length = config.context_length
        self.length_multiple = 1  # a compiled tower is given few lengths, each compiled once
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config, activation, is_causal=True)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self.reset_parameters()

    def forward(self, text: Int[Tensor, "N L"]) -> Float[Tensor, "N E"]:
        """Nothing behind the longest end token of a group of like length is computed."""
        ends = text.argmax(dim=-1)  # the end token is the largest id
        text = trim_text(text, self.length_multiple)
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]  # [N, L, D]; looked up once
        groups = split_by_length(ends)
        x = torch.cat([self.transformer(self.trim(x[rows], ends[rows]), ends[rows]) for rows in groups])  # [N, D]
        x = x[torch.cat(groups).argsort()]  # back into the order of the batch
        return self.ln_final(x) @ self.text_projection

    def trim(self, x: Float[Tensor, "N L D"], ends: Int[Tensor, " N"]) -> Float[Tensor, "N K D"]:
        """Cut a group behind its longest end token, as `trim_text` cuts the batch."""
        return x[:, : longest(ends, self.length_multiple)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """OpenAI's initialisation (GPT-2's, scaled by depth); what is not named keeps PyTorch's default."""
        width, layers = self.positional_embedding.shape[1], len(self.transformer.resblocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        residual_std = width**-0.5 * (2 * layers) ** -0.5  # two residual additions a block
        for block in self.transformer.blocks():
            nn.init.normal_(block.attn.in_proj.weight, std=width**-0.5)
            nn.init.zeros_(block.attn.in_proj.bias)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
        nn.init.normal_(self.text_projection, std=width**-0.5)


def split_by_length(ends: Int[Tensor, " N"]) -> tuple[Int[Tensor, " K"], ...]:
    """Split the rows of a batch into groups of like length, short ones first, by the place of the end token.

    Captions differ much in length, and a group is computed as long as its longest one.
    """
    groups = min(MAX_GROUPS, max(1, len(ends) // MIN_GROUP))
    return ends.argsort(stable=True).chunk(groups)


def trim_text(text: Int[Tensor, "N L"], multiple: int = 1) -> Int[Tensor, "N K"]:
    """Cut a batch behind its longest end token, or at the next `multiple` behind it.

    Exact: attention is causal, so what stands behind the end token never reaches its feature.
    """
    return text[:, : longest(text.argmax(dim=-1), multiple)]


def longest(ends: Int[Tensor, " N"], multiple: int) -> int | None:
    """Tokens up to the last of these end tokens, or to the next `multiple` behind it; None for no rows."""
    return -(-(int(ends.max()) + 1) // multiple) * multiple if len(ends) else None
