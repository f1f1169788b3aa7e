"""The sizes of a CLIP model: frozen values, no torch.

Names follow the paper's Tables 19 and 20; `PRESETS` holds its nine models, larger
ones that others trained since, and small ones for small machines.
"""

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from diptych.config import FIRST_UNNAMED, LATER, MAY_CHANGE
from diptych.errors import UsageError, unknown_name
from diptych.model.architectures import get_layers, get_positions, get_width, read_architecture
from diptych.templates import fill_template

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
ImagePool = Literal["class", "mean", "latent", "queries"]
TextPool = Literal["end", "last", "class"]
Projection = Literal["matrix", "linear", "none"]
"""How a tower's output comes into the joint space. matrix: the paper's, without a bias. linear: with one. none: not at
all, the tower's width is the space's."""
Precision = Literal["auto", "exact", "float32", "bfloat16", "int8"]
"""How exactly a model is used. exact: float32 and Pillow's preprocessing, the numbers of the library reference.
float32: the same in another order of addition, on quickly preprocessed pictures. bfloat16: that with products in half
the bits. int8: of pictures, products in 8 bits with a scale for each token and each output (of texts: what auto is).
auto: bfloat16 where the device multiplies it fast (a GPU, a CPU with AVX512-BF16 or AMX), else float32."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QUERIES = 256
"""Learned queries of CoCa's pool."""


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A Vision Transformer image tower (Dosovitskiy et al. 2020, with the paper's extra `ln_pre`)."""

    image_size: int = 224
    """Side of the square input, pixels."""
    patch_size: int = 32
    """Side of a patch, pixels; the paper's sequence has (image_size / patch_size)^2 + 1 tokens."""
    width: int = 768
    """Residual stream, channels."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads; the paper keeps 64 channels a head."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP, in multiples of `width`; the paper's is 4, some larger OpenCLIP models have more."""
    stem: Literal["patch", "patch_bias", "conv", "mobile"] = "patch"
    """`patch`: one strided convolution, as in the paper; `patch_bias`: with a bias (SigLIP). `conv`: a pyramid of 3x3
    stride-2 convolutions (Xiao et al. 2021), which learns faster from little data; for small models of our own.
    `mobile`: three convolutions that do not overlap, of sides 4, 2 and 2 (MobileCLIP-B, Vasu et al. 2023)."""
    cut_edge: bool = field(default=False, metadata=LATER)
    """Whether image_size may be no multiple of patch_size: what is left over at the right and below is not seen
    (SigLIP SO400M at 384 px)."""
    class_token: bool = field(default=True, metadata=LATER)
    """Whether a token of its own stands before the patches."""
    class_position: bool = field(default=True, metadata=LATER)
    """Whether the class token has a position as the patches have."""
    ln_pre: bool = field(default=True, metadata=LATER)
    """LayerNorm before the blocks: the paper's, which later models leave out."""
    norm_eps: float = field(default=1e-5, metadata=LATER)
    """Added to the variance in every LayerNorm."""
    activation: Activation | None = field(default=None, metadata=LATER)
    """Activation of this tower's MLPs; None: the model's."""
    pool: ImagePool = field(default="class", metadata=LATER)
    """What is read of the last block's tokens. class: the class token. mean: the mean of the patches, then LayerNorm
    (CLIPA). latent: LayerNorm, then attention of one learned query over all, then an MLP (SigLIP, PE). queries: the
    first of `QUERIES` learned queries, whose attention is in the joint space's width (CoCa)."""
    pool_heads: int | None = field(default=None, metadata=LATER)
    """Attention heads of a learned query; None: as many as the blocks have."""
    pool_mlp_ratio: float | None = field(default=None, metadata=LATER)
    """Hidden channels of the latent pool's MLP; None: as the blocks have."""
    rotary_grid: int | None = field(default=None, metadata=LATER)
    """Patches along one side of the pictures that rotary positions (Su et al. 2021) were trained on; None: there are
    none. Half of a head's channels are turned by the column, half by the row; the class token is not turned."""
    rotary_start: float = field(default=0.0, metadata=LATER)
    """Row and column of the first patch."""
    projection: Projection = field(default="matrix", metadata=LATER)
    """From `width` to the joint space."""

    def __post_init__(self) -> None:
        _check_positive(self)
        _check_block(self.width, self.heads, self.mlp_ratio)
        _check_norm(self.norm_eps)
        if self.image_size % self.patch_size and not (self.cut_edge and self.image_size > self.patch_size):
            raise UsageError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"use {self.image_size // self.patch_size * self.patch_size or self.patch_size}"
            )
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise UsageError(f"stem 'conv' halves the picture: patch_size {self.patch_size} must be a power of two")
        if self.stem == "mobile" and (self.patch_size != 16 or self.width % 4 or self.image_size % 16):
            raise UsageError("stem 'mobile' makes patches of 16 px, from a quarter of the width")
        if self.pool == "class" and not self.class_token:
            raise UsageError("pool 'class' reads the class token, which class_token=False leaves out")
        if self.rotary_grid and self.width // self.heads % 4:
            raise UsageError(
                f"rotary positions need 4 n channels a head; {self.width} / {self.heads} is no such number"
            )
        if self.pool_heads and self.pool != "queries" and self.width % self.pool_heads:
            raise UsageError(f"width {self.width} is not divisible by pool_heads {self.pool_heads}")
        if self.pool_mlp_ratio is not None:
            _check_block(self.width, 1, self.pool_mlp_ratio)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.grid**2 + self.class_token

    @property
    def positions(self) -> int:
        """Tokens that have a learned position."""
        return self.grid**2 + (self.class_token and self.class_position)

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the MLP."""
        return round(self.width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """The paper's modified ResNet image tower (section 2.4): ResNet-D stem, blur pooling, attention pooling."""

    image_size: int = 224
    """Side of the square input, pixels; a multiple of 32."""
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Bottleneck blocks in each of the four stages."""
    width: int = 64
    """Channels after the stem; the last stage has 32 times as many (the paper's "ResNet width")."""

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.image_size % 32:
            raise UsageError(f"image_size {self.image_size} is not a multiple of 32, the ResNet's total stride")
        if self.width % 2:
            raise UsageError(
                f"width {self.width} must be even: the first two stem convolutions have width / 2 channels"
            )

    @property
    def out_width(self) -> int:
        """Channels of the final feature map."""
        return self.width * 32

    @property
    def heads(self) -> int:
        """Heads of the attention pool: 64 channels each."""
        return self.out_width // 64

    @property
    def grid(self) -> int:
        """Side of the final feature map."""
        return self.image_size // 32


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """An image tower that timm builds, wrapped as OpenCLIP wraps it (`diptych.model.trunk`)."""

    name: str
    """timm's, of `timm.list_models()`; what stands behind a dot there names weights and is left out of the model."""
    image_size: int = 224
    """Side of the square input, pixels."""
    pool: str = "avg"
    """timm's `global_pool`; empty: as the model has it. abs_attn, rot_attn: attention of the mean over the last map."""
    projection: Literal["head", "none", "linear", "mlp"] = "linear"
    """To the joint space. head: by the trunk's own last layer. none: not at all."""
    bias: bool = False
    """Whether a projection `linear` or `mlp` ends with a bias."""
    sizes: str = "{}"
    """JSON: what else timm is told, such as {"depth": 2}."""

    def __post_init__(self) -> None:
        _check_positive(self)
        if not re.fullmatch(r"\w{1,80}(\.\w{1,80})?", self.name, re.ASCII):
            raise UsageError(f"timm has no model {self.name[:80]!r}")
        if not re.fullmatch(r"\w{0,20}", self.pool, re.ASCII):
            raise UsageError(f"timm has no pool {self.pool[:80]!r}")
        for key, value in self.read_sizes().items():
            numbers = value if isinstance(value, list) else [value]
            most = _TIMM_SIZES.get(key, 0)
            if not 0 < len(numbers) <= 16 or not all(type(n) is int and 0 < n <= most for n in numbers):
                known = ", ".join(f"{name} to {size}" for name, size in _TIMM_SIZES.items())
                raise UsageError(f"timm_model_kwargs has {key[:80]} = {str(value)[:80]}; known are {known}")

    def read_sizes(self) -> dict[str, Any]:
        """`sizes` as values."""
        try:
            sizes = json.loads(self.sizes)
        except (ValueError, RecursionError):
            sizes = None
        if not isinstance(sizes, dict):
            raise UsageError(f"sizes are {self.sizes[:80]!r}, no JSON object")
        return sizes


_TIMM_SIZES = {
    **dict.fromkeys(("depth", "depths", "layers"), 256),
    **dict.fromkeys(("embed_dim", "embed_dims", "dims"), 1 << 14),
    **dict.fromkeys(("num_heads", "patch_size"), 256),
    "img_size": 4096,
}
"""What timm may be told, and the most of each: what it computes of them has no shape in the weights to be held to."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower: a GPT-2 style causal Transformer (section 2.4)."""

    context_length: int = 77
    """Longest token sequence, start and end token included."""
    vocab_size: int = 49408
    """Tokens, the two special ones included; the end token is the largest id."""
    width: int = 512
    """Residual stream, channels."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 8
    """Attention heads; the paper keeps 64 channels a head."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP, in multiples of `width`."""
    is_causal: bool = field(default=True, metadata=LATER)
    """Whether a token sees only what stands before it. Where it sees all, it sees padding too (SigLIP)."""
    pool: TextPool = field(default="end", metadata=LATER)
    """What is read of the last block's tokens. end: the end token. last: the last place, padding or not (SigLIP,
    CLIPA). class: a learned token that is put behind the text (CoCa)."""
    end_id: int | None = field(default=None, metadata=LATER)
    """The end token; None: the largest id of a text, which it is in CLIP's vocabulary."""
    pad_id: int = field(default=0, metadata=LATER)
    """What stands behind a text."""
    norm_eps: float = field(default=1e-5, metadata=LATER)
    """Added to the variance in every LayerNorm."""
    projection: Projection = field(default="matrix", metadata=LATER)
    """From `width` to the joint space."""

    def __post_init__(self) -> None:
        _check_positive(self)
        _check_block(self.width, self.heads, self.mlp_ratio)
        _check_norm(self.norm_eps)
        if self.context_length < 3:
            raise UsageError(f"context_length {self.context_length} leaves no room for a word; use at least 3")
        if self.pool == "class" and not self.is_causal:
            raise UsageError("pool 'class' is CoCa's, whose text tower is causal")
        for name, token in (("end_id", self.end_id), ("pad_id", self.pad_id)):
            if token is not None and not 0 <= token < self.vocab_size:
                raise UsageError(f"{name} {token} is none of {self.vocab_size} tokens")

    @property
    def is_trimmed(self) -> bool:
        """Whether nothing behind the end token reaches what is read, so that it need not be computed."""
        return self.is_causal and self.pool == "end"

    @property
    def positions(self) -> int:
        """Tokens that the blocks see at most."""
        return self.context_length + (self.pool == "class")

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the MLP."""
        return round(self.width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class TransformersTextConfig:
    """A text encoder of transformers as the text tower (`diptych.model.text_encoder`)."""

    architecture: str
    """What `diptych.model.architectures` writes of its config."""
    context_length: int = 77
    """Longest token sequence, start and end token included."""
    pool: Literal["mean", "class", "pooler"] = "mean"
    """What is read of the last block's tokens. mean: the mean of those that are no padding. class: the first. pooler:
    the first behind BERT's own pooler, a layer and tanh."""
    projection: Literal["none", "linear", "mlp", "teacher"] = "mlp"
    """To the joint space, without a bias. mlp: two layers and GELU between them. teacher: LayerNorm, a layer with a
    bias to `project_dim` channels, then another (AltCLIP)."""

    def __post_init__(self) -> None:
        _check_positive(self)
        settings, positions = read_architecture(self.architecture), get_positions(self.architecture)
        if positions is not None and self.context_length > positions:
            raise UsageError(
                f"context_length {self.context_length} is more than the text tower's {positions} positions"
            )
        if self.pool == "pooler" and settings["model_type"] in ("m2m_100", "mt5"):
            raise UsageError(f"{settings['model_type']} has no pooler")
        if (self.projection == "teacher") != ("project_dim" in settings):
            raise UsageError("projection 'teacher' is AltCLIP's, and AltCLIP's is no other")

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return read_architecture(self.architecture)["vocab_size"]

    @property
    def pad_id(self) -> int:
        """What stands behind a text and is not seen."""
        return read_architecture(self.architecture)["pad_token_id"]

    @property
    def width(self) -> int:
        """Residual stream, channels."""
        return get_width(self.architecture)

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return get_layers(self.architecture)


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Two towers that meet in one space."""

    embed_dim: int = 512
    """E: width of the shared embedding space."""
    vision: ViTConfig | ResNetConfig | TimmConfig = field(default_factory=ViTConfig)
    """The image tower."""
    text: TextConfig | TransformersTextConfig = field(default_factory=TextConfig, metadata=FIRST_UNNAMED)
    """The text tower."""
    activation: Activation = "quick_gelu"
    """Activation of every Transformer MLP. OpenAI's weights need `quick_gelu`; most of OpenCLIP's need `gelu`."""
    logit_bias: bool = False
    """Whether logits have a bias: what the sigmoid loss (SigLIP) needs, and the paper's loss has no use for."""
    templates: tuple[str, ...] = field(default=(), compare=False, metadata=MAY_CHANGE | LATER)
    """Prompt templates that suit its captions, for whoever names none; empty: a photo of a {}."""

    def __post_init__(self) -> None:
        _check_positive(self)
        for name, tower in (("vision", self.vision), ("text", self.text)):
            if not isinstance(tower, ResNetConfig | TimmConfig) and tower.projection == "none":
                width = self.embed_dim if isinstance(tower, ViTConfig) and tower.pool == "queries" else tower.width
                if width != self.embed_dim:
                    raise UsageError(f"{name} has no projection: its width {width} must be embed_dim {self.embed_dim}")
        if isinstance(self.vision, ViTConfig) and self.vision.pool == "queries":
            _check_block(self.embed_dim, self.vision.pool_heads or self.vision.heads, 4.0)
        for template in self.templates:
            fill_template(template, "")


def check_activation(name: str) -> Activation:
    """The activation of this name; UsageError if there is none."""
    if name == "quick_gelu" or name == "gelu" or name == "gelu_tanh":
        return name
    raise unknown_name("activation", name, get_args(Activation))


def _check_positive(config: object) -> None:
    for name, value in vars(config).items():
        if name in ("pad_id", "end_id"):
            continue
        if not all(number >= 1 for number in (value if isinstance(value, tuple) else (value,)) if type(number) is int):
            raise UsageError(f"{name} {value} must be at least 1")


def _check_block(width: int, heads: int, mlp_ratio: float) -> None:
    if width % heads:
        raise UsageError(f"width {width} is not divisible by heads {heads}; the paper uses width / 64 heads")
    if not 1 <= width * mlp_ratio < 1 << 31:
        raise UsageError(f"mlp_ratio {mlp_ratio} is no ratio for an MLP; the paper uses 4")


def _check_norm(eps: float) -> None:
    if not 0 < eps < 1:
        raise UsageError(f"norm_eps {eps} is no small number above 0; the paper uses 1e-5")


def _vit(
    embed_dim: int,
    image_size: int,
    patch_size: int,
    width: int,
    layers: int,
    text_width: int,
    *,
    heads: int | None = None,
    mlp_width: int | None = None,
    text_layers: int = 12,
    activation: Activation = "quick_gelu",
) -> CLIPConfig:
    vision = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=layers,
        heads=heads or width // 64,
        mlp_ratio=mlp_width / width if mlp_width else 4.0,
    )
    text = TextConfig(width=text_width, layers=text_layers, heads=text_width // 64)
    return CLIPConfig(embed_dim=embed_dim, vision=vision, text=text, activation=activation)


def _resnet(
    embed_dim: int, image_size: int, layers: tuple[int, int, int, int], width: int, text_width: int
) -> CLIPConfig:
    return CLIPConfig(
        embed_dim=embed_dim,
        vision=ResNetConfig(image_size=image_size, layers=layers, width=width),
        text=TextConfig(width=text_width, heads=text_width // 64),
    )


def _small(vision: ViTConfig | ResNetConfig, *, width: int, layers: int) -> CLIPConfig:
    text = TextConfig(width=width, layers=layers, heads=width // 64)
    return CLIPConfig(embed_dim=width, vision=vision, text=text)


PAPER_PRESETS: dict[str, CLIPConfig] = {
    # Tables 19 and 20; parameter counts are checked to the last one in tests/model/test_clip.py.
    "RN50": _resnet(1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": _resnet(512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": _resnet(640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": _resnet(768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": _resnet(1024, 448, (3, 15, 36, 10), 128, 1024),
    "ViT-B-32": _vit(512, 224, 32, 768, 12, 512),
    "ViT-B-16": _vit(512, 224, 16, 768, 12, 512),
    "ViT-L-14": _vit(768, 224, 14, 1024, 24, 768),
    "ViT-L-14-336": _vit(768, 336, 14, 1024, 24, 768),
}

OPEN_CLIP_PRESETS: dict[str, CLIPConfig] = {
    # Larger and smaller ViTs that OpenCLIP, DataComp, DFN and MetaCLIP trained (OpenCLIP 3.3.0's configurations).
    # Most were trained with GELU; a checkpoint that needs the other activation says so itself.
    "ViT-B-32-256": _vit(512, 256, 32, 768, 12, 512, activation="gelu"),
    "ViT-B-16-plus-240": _vit(640, 240, 16, 896, 12, 640, activation="gelu"),
    "ViT-L-14-280": _vit(768, 280, 14, 1024, 24, 768, activation="gelu"),
    "ViT-L-16": _vit(768, 224, 16, 1024, 24, 768, activation="gelu"),
    "ViT-H-14": _vit(1024, 224, 14, 1280, 32, 1024, heads=16, text_layers=24, activation="gelu"),
    "ViT-H-14-378": _vit(1024, 378, 14, 1280, 32, 1024, heads=16, text_layers=24, activation="gelu"),
    "ViT-g-14": _vit(1024, 224, 14, 1408, 40, 1024, heads=16, mlp_width=6144, text_layers=24, activation="gelu"),
    "ViT-bigG-14": _vit(1280, 224, 14, 1664, 48, 1280, heads=16, mlp_width=8192, text_layers=32, activation="gelu"),
}

_TINY = ViTConfig(image_size=64, patch_size=16, width=256, layers=6, heads=4)

SMALL_PRESETS: dict[str, CLIPConfig] = {
    # For small pictures and small machines: not in the paper.
    "ViT-Ti-16": _small(_TINY, width=256, layers=4),
    "ViT-Ti-16-conv": _small(replace(_TINY, stem="conv"), width=256, layers=4),
    "ViT-Ti-16-112": _small(replace(_TINY, image_size=112), width=256, layers=4),
    "ViT-S-16": _small(ViTConfig(image_size=112, patch_size=16, width=384, layers=12, heads=6), width=384, layers=6),
    "RN-Ti": CLIPConfig(
        embed_dim=256,
        vision=ResNetConfig(image_size=32, layers=(2, 2, 2, 1), width=16),
        text=TextConfig(width=192, layers=2, heads=3),
    ),
}

PRESETS: dict[str, CLIPConfig] = PAPER_PRESETS | OPEN_CLIP_PRESETS | SMALL_PRESETS


def get_preset(name: str) -> CLIPConfig:
    """Look a preset up by name; a near miss is answered with suggestions."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
