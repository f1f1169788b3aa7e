"""How an image tower that has no class token, or does not read it, makes one vector of its tokens: a learned query
looks at all of them.

Shapes: N pictures, L tokens, D width, A heads, E the joint space.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.model.config import QUERIES, Activation, ViTConfig
from diptych.model.transformer import MLP


class LatentPool(nn.Module):
    """Attention of one learned query, then an MLP beside it: SigLIP's head (Zhai et al. 2022, "MAP")."""

    def __init__(self, config: ViTConfig, activation: Activation) -> None:
        super().__init__()
        width = config.width
        self.heads = config.pool_heads or config.heads
        self.latent = nn.Parameter(torch.empty(width))
        self.in_proj = nn.Linear(width, 3 * width)  # query, key, value
        self.out_proj = nn.Linear(width, width)
        self.ln = nn.LayerNorm(width, config.norm_eps)
        self.mlp = MLP(width, round(width * (config.pool_mlp_ratio or config.mlp_ratio)), activation)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The query N(0, 1 / width), the rest as the blocks have it."""
        nn.init.normal_(self.latent, std=self.latent.shape[0] ** -0.5)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N D"]:
        width = self.latent.shape[0]
        weights, biases = self.in_proj.weight.split([width, 2 * width]), self.in_proj.bias.split([width, 2 * width])
        query, pairs = F.linear(self.latent, weights[0], biases[0]), F.linear(x, weights[1], biases[1])
        keys, values = pairs.chunk(2, dim=-1)
        pooled = self.out_proj(look(query.expand(len(x), -1), keys, values, self.heads))
        return pooled + self.mlp(self.ln(pooled))


class QueryPool(nn.Module):
    """Attention of many learned queries in the joint space's width, of which a picture's feature is the first (CoCa,
    Yu et al. 2022, as OpenCLIP built it). The others are what a caption decoder looks at; they are not computed."""

    def __init__(self, config: ViTConfig, embed_dim: int) -> None:
        super().__init__()
        self.heads = config.pool_heads or config.heads
        self.query = nn.Parameter(torch.empty(QUERIES, embed_dim))
        self.ln_q = nn.LayerNorm(embed_dim, config.norm_eps)
        self.ln_k = nn.LayerNorm(config.width, config.norm_eps)
        self.q_weight = nn.Parameter(torch.empty(embed_dim, embed_dim))
        self.k_weight = nn.Parameter(torch.empty(embed_dim, config.width))
        self.v_weight = nn.Parameter(torch.empty(embed_dim, config.width))
        self.in_bias = nn.Parameter(torch.empty(3 * embed_dim))  # of query, key, value
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Queries N(0, 1), the rest as nn.MultiheadAttention has it."""
        nn.init.normal_(self.query)
        for weight in (self.q_weight, self.k_weight, self.v_weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.in_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N E"]:
        x, q_bias, k_bias, v_bias = self.ln_k(x), *self.in_bias.chunk(3)
        query = F.linear(self.ln_q(self.query[0]), self.q_weight, q_bias)
        keys, values = F.linear(x, self.k_weight, k_bias), F.linear(x, self.v_weight, v_bias)
        return self.out_proj(look(query.expand(len(x), -1), keys, values, self.heads))


def look(
    query: Float[Tensor, "N D"], keys: Float[Tensor, "N L D"], values: Float[Tensor, "N L D"], heads: int
) -> Float[Tensor, "N D"]:
    """Attention of one query a row."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query.unsqueeze(1), keys, values))
    return F.scaled_dot_product_attention(q, k, v).flatten(1)
