"""The text tower: a causal Transformer whose feature is read at the end token (paper section 2.4).

Later models read another token, or let every token see all, padding too; then nothing can be cut off.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.errors import UsageError
from diptych.model.config import Activation, TextConfig
from diptych.model.transformer import Sight, Transformer

MAX_GROUPS, MIN_GROUP = 8, 64
"""Into how many groups of like length a batch is split at most, and how many texts a group has at least."""


class TextTransformer(nn.Module):
    """Tokens [N, L] -> text features [N, E], not normalised. L may be anything up to `context_length`."""

    def __init__(self, config: TextConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        self.config = config
        self.context_length = config.context_length
        self.length_multiple = 1  # a compiled tower is given few lengths, each compiled once
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.positions, config.width))
        self.class_embedding = nn.Parameter(torch.empty(config.width)) if config.pool == "class" else None
        self.transformer = Transformer(config, activation)
        self.ln_final = nn.LayerNorm(config.width, config.norm_eps)
        has_matrix = config.projection != "none"
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim)) if has_matrix else None
        self.projection_bias = nn.Parameter(torch.empty(embed_dim)) if config.projection == "linear" else None
        self.reset_parameters()

    def forward(self, text: Int[Tensor, "N L"]) -> Float[Tensor, "N E"]:
        """Nothing behind the longest end token of a group of like length is computed, where that is exact."""
        if text.shape[1] > self.context_length:
            raise UsageError(f"texts of {text.shape[1]} tokens do not fit; the text tower takes {self.context_length}")
        return self.project(self.encode_trimmed(text) if self.config.is_trimmed else self.encode_whole(text))

    def project(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """What was read of the last block -> features."""
        x = self.ln_final(x)
        if self.text_projection is not None:
            x = x @ self.text_projection
        return x if self.projection_bias is None else x + self.projection_bias

    def encode_trimmed(self, text: Int[Tensor, "N L"]) -> Float[Tensor, "N D"]:
        """The last block at the end token of each text, in groups of like length."""
        ends = find_ends(text, self.config.end_id)
        text = text[:, : longest(ends, self.length_multiple)]
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]  # [N, L, D]; looked up once
        groups = split_by_length(ends)
        sight = Sight(is_causal=True)
        x = torch.cat([self.transformer(self.trim(x[rows], ends[rows]), ends[rows], sight) for rows in groups])
        return x[torch.cat(groups).argsort()]  # [N, D], back into the order of the batch

    def encode_whole(self, text: Int[Tensor, "N L"]) -> Float[Tensor, "N D"]:
        """The last block at the token that is read, padding computed as the model was trained with it."""
        x, sight = self.embed(text)
        return self.transformer(x, self.get_read(text), sight)

    def embed(self, text: Int[Tensor, "N L"]) -> tuple[Float[Tensor, "N K D"], Sight]:
        """What the blocks begin with for whole rows, and what they see."""
        text = F.pad(text, (0, self.context_length - text.shape[1]), value=self.config.pad_id)
        x, sight = self.token_embedding(text), Sight(is_causal=self.config.is_causal)
        if self.class_embedding is not None:
            x = torch.cat([x, self.class_embedding.to(x.dtype).expand(len(x), 1, -1)], dim=1)
            sight = Sight(mask=see_padding_once(text, self.config.pad_id))
        return x + self.positional_embedding, sight

    def get_read(self, text: Int[Tensor, "N L"]) -> Int[Tensor, " N"]:
        """Which token of each text is read."""
        if self.config.pool == "end":
            return find_ends(text, self.config.end_id)
        return torch.full((len(text),), self.config.positions - 1, dtype=torch.int64, device=text.device)

    def trim(self, x: Float[Tensor, "N L D"], ends: Int[Tensor, " N"]) -> Float[Tensor, "N K D"]:
        """Cut a group behind its longest end token, as the batch is cut."""
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
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding, std=0.01)
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)
        if self.projection_bias is not None:
            nn.init.zeros_(self.projection_bias)


def find_ends(text: Int[Tensor, "N L"], end_id: int | None) -> Int[Tensor, " N"]:
    """The place of the end token: the first of its id, or of the largest id of a text."""
    return (text if end_id is None else (text == end_id).int()).argmax(dim=-1)


def see_padding_once(text: Int[Tensor, "N L"], pad_id: int) -> Bool[Tensor, "N 1 K K"]:
    """What CoCa's tokens, the class token behind them, see: nothing behind them, and of padding the first token only.

    That one should not be seen either: OpenCLIP's mask stands one place too far to the right, and its weights were
    trained with it.
    """
    seen = F.pad(text != pad_id, (1, 0), value=True)  # [N, L + 1]
    return torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=text.device).tril() & seen[:, None, None]


def split_by_length(ends: Int[Tensor, " N"]) -> tuple[Int[Tensor, " K"], ...]:
    """Split the rows of a batch into groups of like length, short ones first, by the place of the end token.

    Captions differ much in length, and a group is computed as long as its longest one.
    """
    groups = min(MAX_GROUPS, max(1, len(ends) // MIN_GROUP))
    return ends.argsort(stable=True).chunk(groups)


def longest(ends: Int[Tensor, " N"], multiple: int) -> int | None:
    """Tokens up to the last of these end tokens, or to the next `multiple` behind it; None for no rows."""
    return -(-(int(ends.max()) + 1) // multiple) * multiple if len(ends) else None
