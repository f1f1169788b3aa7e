"""An image tower that timm builds: ConvNeXt, EVA, ViTamin, FastViT and whatever else it has.

Modules and names are those of OpenCLIP's TimmModel: `trunk`, and `head` behind it. timm is imported when such a tower
is built, and only then.
"""

import importlib
from collections import OrderedDict
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import UsageError, install
from diptych.model.config import TimmConfig


class TimmTower(nn.Module):
    """Pictures [N, 3, H, W] -> image features [N, E], not normalised. As of a ResNet, there is one kind of features."""

    def __init__(self, config: TimmConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.pooled_width = embed_dim
        timm = import_timm()
        try:
            self.trunk, self.head = _build(timm, config, embed_dim)
        except (TypeError, ValueError, AssertionError, KeyError, AttributeError) as error:
            raise UsageError(f"timm's {config.name} cannot be built as described: {str(error)[:200]}") from None

    def forward(self, image: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N E"]:
        return self.project(self.pool(image))

    def pool(self, image: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N E"]:
        """The features themselves."""
        return self.head(self.trunk(image))

    def project(self, pooled: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """Nothing is left to be done."""
        return pooled


def import_timm() -> Any:
    """timm; UsageError, which names the extra, if it cannot be imported."""
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision of another torch fails in its own ways
        raise UsageError(
            f"timm cannot be imported ({error}); {install('timm')} beside a torchvision that fits your torch"
        ) from None


def _build(timm: Any, config: TimmConfig, embed_dim: int) -> tuple[nn.Module, nn.Sequential]:
    if not timm.is_model(config.name.partition(".")[0]):
        raise UsageError(f"timm {timm.__version__} has no model {config.name}; a newer one may have it")
    pools_apart, sizes = config.pool in ("abs_attn", "rot_attn"), config.read_sizes()
    if config.projection in ("head", "none") and not pools_apart:
        outputs = embed_dim if config.projection == "head" else 0
        trunk = timm.create_model(config.name, pretrained=False, num_classes=outputs, global_pool=config.pool, **sizes)
        if not outputs and trunk.num_features != embed_dim:
            raise UsageError(f"{config.name} has no projection: its width {trunk.num_features} must be {embed_dim}")
        return trunk, nn.Sequential()
    trunk = timm.create_model(config.name, pretrained=False, **sizes)
    given = {"global_pool": ""} if pools_apart else {"global_pool": config.pool} if config.pool else {}
    trunk.reset_classifier(0, **given)
    width, head = trunk.num_features, OrderedDict[str, nn.Module]()
    if pools_apart:
        layers = timm.layers
        if config.pool == "abs_attn":
            grid = trunk.default_cfg.get("pool_size")
            head["pool"] = layers.AttentionPool2d(width, feat_size=grid, out_features=embed_dim)
        else:
            head["pool"] = layers.RotAttentionPool2d(width, out_features=embed_dim)
        width = embed_dim
    if config.projection == "linear":
        head["proj"] = nn.Linear(width, embed_dim, bias=config.bias)
    elif config.projection == "mlp":
        head["mlp"] = timm.layers.Mlp(width, 2 * embed_dim, embed_dim, bias=(True, config.bias))
    return trunk, nn.Sequential(head)
