"""CLIP: two towers, one space, one temperature (paper Figure 3)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.model.config import CLIPConfig, ResNetConfig, TextConfig, TimmConfig, TransformersTextConfig, ViTConfig
from diptych.model.resnet import ModifiedResNet
from diptych.model.text import TextTransformer
from diptych.model.text_encoder import TransformersText
from diptych.model.trunk import TimmTower
from diptych.model.vision import VisionTransformer

INIT_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)  # section 2.5: logits are never scaled by more than 100


class CLIPOutput(NamedTuple):
    """Normalised features [N, E] of both towers and the scale exp(t) of their similarities."""

    image_features: Float[Tensor, "N E"]
    text_features: Float[Tensor, "N E"]
    logit_scale: Float[Tensor, ""]


class BiasedOutput(NamedTuple):
    """What a model with a bias returns: for the sigmoid loss, logits are logit_scale * similarity + logit_bias."""

    image_features: Float[Tensor, "N E"]
    text_features: Float[Tensor, "N E"]
    logit_scale: Float[Tensor, ""]
    logit_bias: Float[Tensor, ""]


Output = CLIPOutput | BiasedOutput


class CLIP(nn.Module):
    """The dual encoder.

    `model(image, text)` is the upper half of Figure 3, `diptych.train.loss.clip_loss` the lower one:
    logits_per_image = logit_scale * image_features @ text_features.T
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = build_image_tower(config)
        self.text = build_text_tower(config)
        self.logit_scale = nn.Parameter(torch.tensor(INIT_LOGIT_SCALE))  # a logarithm
        self.logit_bias = nn.Parameter(torch.tensor(0.0)) if config.logit_bias else None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, and so of the features outside autocast."""
        return self.logit_scale.dtype

    def encode_image(
        self,
        image: Float[Tensor, "N 3 H W"],
        normalize: bool = False,
        patches: Int[Tensor, "N K"] | None = None,
    ) -> Float[Tensor, "N E"]:
        """Pictures, preprocessed -> features, in the type of the weights; a ViT may be shown some `patches` only."""
        seen = () if patches is None else (patches,)
        features = self.visual(image.to(self.dtype), *seen)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Int[Tensor, "N L"], normalize: bool = False) -> Float[Tensor, "N E"]:
        """Tokens -> features. Padding costs nothing: the tower cuts it off."""
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self,
        image: Float[Tensor, "N 3 H W"],
        text: Int[Tensor, "N L"],
        patches: Int[Tensor, "N K"] | None = None,
        image_features: Float[Tensor, "N E"] | None = None,
        text_features: Float[Tensor, "N E"] | None = None,
    ) -> Output:
        """Pictures and their texts -> normalised features, exp(logit_scale), and the bias of a model that has one.

        A tower whose normalised features are there already does not run.
        """
        if image_features is None:
            image_features = self.encode_image(image, normalize=True, patches=patches)
        if text_features is None:
            text_features = self.encode_text(text, normalize=True)
        output = CLIPOutput(image_features, text_features, self.logit_scale.exp())
        return output if self.logit_bias is None else BiasedOutput(*output, self.logit_bias)


ImageTower = VisionTransformer | ModifiedResNet | TimmTower
"""`pool` makes one vector of a picture, `project` brings it into the joint space; calling it does both."""
TextTower = TextTransformer | TransformersText


def build_image_tower(config: CLIPConfig) -> ImageTower:
    """Build the image tower that the type of `config.vision` asks for."""
    match config.vision:
        case ViTConfig():
            return VisionTransformer(config.vision, config.embed_dim, config.activation)
        case ResNetConfig():
            return ModifiedResNet(config.vision, config.embed_dim)
        case TimmConfig():
            return TimmTower(config.vision, config.embed_dim)


def build_text_tower(config: CLIPConfig) -> TextTower:
    """Build the text tower that the type of `config.text` asks for."""
    match config.text:
        case TextConfig():
            return TextTransformer(config.text, config.embed_dim, config.activation)
        case TransformersTextConfig():
            return TransformersText(config.text, config.embed_dim)
