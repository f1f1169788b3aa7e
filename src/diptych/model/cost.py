"""What a model costs, from its config alone: parameters, floating-point operations, memory kept for the backward pass.

A cost is the sum of the costs of its layers, so the functions below follow the towers' code line by line. Nothing is
built and torch is not imported. `tests/model/test_cost.py` holds every number against the real model.
"""

from dataclasses import dataclass
from itertools import pairwise

from diptych.errors import UsageError
from diptych.model.config import (
    QUERIES,
    CLIPConfig,
    Projection,
    ResNetConfig,
    TextConfig,
    TimmConfig,
    TransformersTextConfig,
    ViTConfig,
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one layer, or of many."""

    parameters: int = 0
    """Numbers that are trained."""
    flops: int = 0
    """FLOPs of one pair's forward pass: matrix products and convolutions, a multiply-add counted as two."""
    saved: int = 0
    """Elements of one pair that are kept for the backward pass, in the type of the products."""
    saved_float32: int = 0
    """Those that are kept in float32 in any precision: the residual stream and statistics."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            parameters=self.parameters + other.parameters,
            flops=self.flops + other.flops,
            saved=self.saved + other.saved,
            saved_float32=self.saved_float32 + other.saved_float32,
        )

    def activation_bytes(self, itemsize: int) -> int:
        """Bytes of one pair kept for the backward pass; `itemsize` is that of the products."""
        return itemsize * self.saved + 4 * self.saved_float32


@dataclass(frozen=True, kw_only=True)
class Block:
    """A Transformer block, the part of a tower that is recomputed, or gathered, as one."""

    inside: Cost
    """All of it."""
    input: Cost
    """What is kept when the rest is recomputed: the tensor that goes in."""
    last_product: Cost
    """What is not recomputed: nothing of the backward pass waits for its output."""


@dataclass(frozen=True, kw_only=True)
class TowerCost:
    """A tower: Transformer blocks, and what stands before and behind them."""

    blocks: tuple[Block, ...]
    """In their order; a ResNet has none."""
    outside: Cost
    """Stem, embeddings, the last norm and the projection; all of a ResNet."""

    @property
    def parameters(self) -> int:
        """Parameters of the whole tower."""
        return self._whole.parameters

    @property
    def flops(self) -> int:
        """FLOPs of one pair's forward pass."""
        return self._whole.flops

    @property
    def recomputed_flops(self) -> int:
        """FLOPs of one pair, when every block is computed again for its backward pass."""
        return sum(block.inside.flops - block.last_product.flops for block in self.blocks)

    @property
    def largest_block(self) -> int:
        """Parameters of the largest block; 0 if there is none."""
        return max((block.inside.parameters for block in self.blocks), default=0)

    def activation_bytes(self, itemsize: int, *, recompute: bool = False) -> int:
        """Bytes of one pair kept for the backward pass: pictures, inputs of products, norms and activations, queries,
        keys and values; not parameters, not the gradients that pass by. Attention is the fused kind, which keeps no
        L x L matrix. With `recompute` every block keeps its input only, and the largest one is there whole."""
        if not recompute:
            return self._whole.activation_bytes(itemsize)
        inputs = [block.input.activation_bytes(itemsize) for block in self.blocks]
        wholes = [block.inside.activation_bytes(itemsize) for block in self.blocks]
        largest = max((whole - own for whole, own in zip(wholes, inputs, strict=True)), default=0)
        return self.outside.activation_bytes(itemsize) + sum(inputs) + largest

    @property
    def _whole(self) -> Cost:
        return sum((block.inside for block in self.blocks), self.outside)


def image_tower(config: CLIPConfig) -> TowerCost:
    """Cost of the image tower, for one picture."""
    match config.vision:
        case ViTConfig():
            return _vit(config.vision, config.embed_dim)
        case ResNetConfig():
            return _resnet(config.vision, config.embed_dim)
        case TimmConfig():
            raise UsageError(f"what timm's {config.vision.name} costs is not known: its layers are timm's")


def text_tower(config: CLIPConfig, tokens: int) -> TowerCost:
    """Cost of the text tower for a caption of `tokens`, start and end included; padding behind it costs nothing, unless
    the tower sees it."""
    text = config.text
    if isinstance(text, TransformersTextConfig):
        raise UsageError("what a text tower of transformers costs is not known: its layers are not ours")
    if not 2 <= tokens <= text.context_length:
        raise UsageError(f"a caption of {tokens} tokens does not fit; use 2 to {text.context_length}, the text tower's")
    rows = text.vocab_size + text.positions + (text.pool == "class")
    return TowerCost(
        blocks=_blocks(text, tokens if text.is_trimmed else text.positions, reads_one=True),
        outside=Cost(parameters=rows * text.width)
        + _norm(1, text.width)
        + _projection(text.projection, text.width, config.embed_dim),
    )


# --- towers, in the order of their forward passes -------------------------------------------------------------------


def _vit(config: ViTConfig, embed_dim: int) -> TowerCost:
    tokens, width = config.tokens, config.width
    outside = _stem(config) + Cost(parameters=(config.class_token + config.positions) * width)
    if config.ln_pre:
        outside += _norm(tokens, width)
    match config.pool:
        case "class" | "mean":
            outside += _norm(1, width)
        case "latent":
            outside += _norm(tokens, width) + _latent_pool(config)
        case "queries":
            outside += _query_pool(config, embed_dim) + _norm(1, embed_dim)
            width = embed_dim
    return TowerCost(
        blocks=_blocks(config, tokens, reads_one=config.pool == "class"),
        outside=outside + _projection(config.projection, width, embed_dim),
    )


def _projection(kind: Projection, width: int, embed_dim: int) -> Cost:
    return Cost() if kind == "none" else _linear(1, width, embed_dim, bias=kind == "linear")


def _latent_pool(config: ViTConfig) -> Cost:
    tokens, width = config.tokens, config.width
    hidden = round(width * (config.pool_mlp_ratio or config.mlp_ratio))
    return (
        Cost(parameters=width + width * (width + 1))  # the query and its projection, computed once a batch
        + _linear(tokens, width, 2 * width)
        + Cost(
            flops=4 * tokens * width, saved=2 * tokens * width + width, saved_float32=config.pool_heads or config.heads
        )
        + _linear(1, width, width)
        + _norm(1, width)
        + _linear(1, width, hidden)
        + Cost(saved=hidden)  # the activation's input
        + _linear(1, hidden, width)
    )


def _query_pool(config: ViTConfig, embed_dim: int) -> Cost:
    tokens, width = config.tokens, config.width
    return (
        Cost(parameters=QUERIES * embed_dim + 2 * embed_dim + embed_dim * (embed_dim + 1))
        + _norm(tokens, width)
        + _linear(tokens, width, embed_dim)
        + _linear(tokens, width, embed_dim)
        + Cost(flops=4 * tokens * embed_dim, saved=2 * tokens * embed_dim + embed_dim)
        + Cost(saved_float32=config.pool_heads or config.heads)
        + _linear(1, embed_dim, embed_dim)
    )


def _stem(config: ViTConfig) -> Cost:
    if config.stem in ("patch", "patch_bias"):
        side = config.grid * config.patch_size
        cost = _convolution(3, config.width, side, kernel=config.patch_size, stride=config.patch_size)
        return cost + Cost(parameters=config.width if config.stem == "patch_bias" else 0)
    if config.stem == "mobile":
        quarter, side = config.width // 4, config.image_size
        cost = _convolution(3, quarter, side, kernel=4, stride=4) + _normalised_map(quarter, side // 4)
        cost += _map(quarter, side // 4)  # GELU's input
        cost += _convolution(quarter, quarter, side // 4, kernel=2, stride=2) + _normalised_map(quarter, side // 8)
        cost += _map(quarter, side // 8)
        last = _convolution(quarter, config.width, side // 8, kernel=2, stride=2)
        return cost + last + Cost(parameters=config.width)
    halvings = config.patch_size.bit_length() - 1
    channels = [3, *(config.width // 2**i for i in reversed(range(halvings)))]
    cost, side = Cost(), config.image_size
    for before, after in pairwise(channels):
        cost += _convolution(before, after, side, kernel=3, stride=2)
        side = (side + 1) // 2
        cost += _normalised_map(after, side)  # ReLU works in place: its output is the next convolution's input
    return cost + _convolution(config.width, config.width, side)


def _blocks(config: ViTConfig | TextConfig, tokens: int, *, reads_one: bool) -> tuple[Block, ...]:
    """Cost of each block; where one token is read, the last computes it only, but its keys and values are of all."""

    def build(queries: int) -> Block:
        return Block(
            inside=_block(config, tokens, queries),
            input=Cost(saved_float32=tokens * config.width),
            last_product=_linear(queries, config.mlp_width, config.width),
        )

    return (*(config.layers - 1) * (build(tokens),), build(1 if reads_one else tokens))


def _block(config: ViTConfig | TextConfig, tokens: int, queries: int) -> Cost:
    width, hidden = config.width, config.mlp_width
    one_query = Cost(saved=width) if queries < tokens else Cost()  # a copy; of all tokens they lie with the keys
    attention = Cost(
        flops=4 * queries * tokens * width,  # with every key and value; a causal kernel may leave out half
        saved=3 * tokens * width,
        saved_float32=queries * config.heads,  # the logarithms of the sums of softmax
    )
    return (
        _norm(tokens, width)
        + _linear(tokens, width, 3 * width)
        + one_query
        + attention
        + _linear(queries, width, width)
        + _norm(queries, width)
        + _linear(queries, width, hidden)
        + Cost(saved=queries * hidden)  # the activation's input
        + _linear(queries, hidden, width)
    )


def _resnet(config: ResNetConfig, embed_dim: int) -> TowerCost:
    width, side = config.width, config.image_size
    stem = _convolution(3, width // 2, side, kernel=3, stride=2) + _normalised_map(width // 2, side // 2)
    for before, after in ((width // 2, width // 2), (width // 2, width)):
        stem += _convolution(before, after, side // 2, kernel=3) + _normalised_map(after, side // 2)
    stem += _map(width, side // 2)  # the average pool's input
    cost, before, side = stem, width, side // 4
    for stage, count in enumerate(config.layers):
        channels = width * 2**stage
        for i in range(count):
            stride = 2 if stage and not i else 1
            cost += _bottleneck(before, channels, side, stride)
            before, side = 4 * channels, side // stride
    return TowerCost(blocks=(), outside=cost + _attention_pool(config, embed_dim))


def _bottleneck(before: int, channels: int, side: int, stride: int) -> Cost:
    after, out = 4 * channels, side // stride
    cost = _convolution(before, channels, side) + _normalised_map(channels, side)
    cost += _convolution(channels, channels, side, kernel=3) + _normalised_map(channels, side)
    if stride > 1:
        cost += _map(channels, side)  # the average pool's input
    cost += _convolution(channels, after, out) + _normalised_map(after, out)
    if stride > 1 or before != after:
        shortcut = _convolution(before, after, out)
        if stride == 1:  # its input is the first convolution's, kept once
            shortcut += Cost(saved=-before * out**2)
        cost += shortcut + _normalised_map(after, out)
    return cost


def _attention_pool(config: ResNetConfig, embed_dim: int) -> Cost:
    width, tokens = config.out_width, config.grid**2 + 1
    return (
        Cost(parameters=tokens * width)
        + _map(width, config.grid)  # the last block's ReLU
        + _linear(1, width, width)
        + _linear(tokens, width, width)
        + _linear(tokens, width, width)
        + Cost(flops=4 * tokens * width, saved=tokens * width + width, saved_float32=config.heads)
        + _linear(1, width, embed_dim)
    )


# --- layers -----------------------------------------------------------------------------------------------------------


def _linear(tokens: int, inputs: int, outputs: int, *, bias: bool = True) -> Cost:
    """Keeps its input."""
    return Cost(
        parameters=inputs * outputs + bias * outputs, flops=2 * tokens * inputs * outputs, saved=tokens * inputs
    )


def _norm(tokens: int, width: int) -> Cost:
    """Keeps its input, a mean and a deviation."""
    return Cost(parameters=2 * width, saved_float32=tokens * (width + 2))


def _convolution(before: int, after: int, side: int, *, kernel: int = 1, stride: int = 1) -> Cost:
    """Cost of a convolution over a square map of `side`; keeps its input."""
    weights, out = kernel**2 * before * after, -(-side // stride)
    return Cost(parameters=weights, flops=2 * weights * out**2, saved=before * side**2)


def _normalised_map(channels: int, side: int) -> Cost:
    """A norm of the channels of a map; keeps its input. The ReLU behind it keeps what the next layer takes in."""
    return Cost(parameters=2 * channels, saved=channels * side**2)


def _map(channels: int, side: int) -> Cost:
    """Keeps a map."""
    return Cost(saved=channels * side**2)
