"""The paper's modified ResNet image tower (section 2.4): a three-convolution stem, average pooling before every
strided step (anti-aliasing), and attention pooling in place of the global average.
"""

from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.model.config import ResNetConfig


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; every convolution has stride 1, the stride is an average pool before the last."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(  # the names of OpenAI's state dict
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride) if stride > 1 else nn.Identity()),
                        ("0", nn.Conv2d(in_channels, out_channels, 1, bias=False)),
                        ("1", nn.BatchNorm2d(out_channels)),
                    ]
                )
            )

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C2 H2 W2"]:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        return F.relu(y + self.downsample(x))


class AttentionPool(nn.Module):
    """One attention layer whose single query is the mean of the feature map (section 2.4).

    Only that query is projected and attended with: the other H * W outputs are never used.
    """

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N E"]:
        x = x.flatten(2).transpose(1, 2)  # [N, H * W, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # [N, H * W + 1, C]
        q, k, v = self.q_proj(x[:, 0]).unsqueeze(1), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, A, 1 or L, C / A]
        x = F.scaled_dot_product_attention(q, k, v)  # [N, A, 1, C / A]
        return self.c_proj(x.flatten(1))


class ModifiedResNet(nn.Module):
    """Pictures [N, 3, H, W] -> image features [N, E], not normalised."""

    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.image_size = config.image_size
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = build_stage(width, width, config.layers[0], stride=1)
        self.layer2 = build_stage(width * 4, width * 2, config.layers[1], stride=2)
        self.layer3 = build_stage(width * 8, width * 4, config.layers[2], stride=2)
        self.layer4 = build_stage(width * 16, width * 8, config.layers[3], stride=2)
        self.attnpool = AttentionPool(config.grid, config.out_width, config.heads, embed_dim)
        self.pooled_width = embed_dim
        self.reset_parameters()

    def forward(self, image: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N E"]:
        return self.pool(image)

    def project(self, pooled: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """Attention pooling ends in the joint space: there is nothing left to project."""
        return pooled

    def pool(self, image: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N E"]:
        """The features; a ResNet has only one kind."""
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(F.relu(self.bn3(self.conv3(x))))  # [N, w, H / 4, W / 4]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [N, 32 w, H / 32, W / 32]
        return self.attnpool(x)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """OpenAI's initialisation: attention pool N(0, 1 / C); each block's last BatchNorm starts at zero, so that
        every block starts as the identity (Goyal et al. 2017)."""
        std = self.attnpool.q_proj.in_features**-0.5
        pool = self.attnpool
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            nn.init.normal_(projection.weight, std=std)
        nn.init.normal_(pool.positional_embedding, std=std)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)


def build_stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Build a stage: the first block strides and widens, the rest keep the shape."""
    first = Bottleneck(in_channels, channels, stride)
    rest = (Bottleneck(channels * Bottleneck.expansion, channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
