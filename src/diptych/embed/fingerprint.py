"""What names the space that features lie in: features with one name can be compared, and kept for each other."""

import json

import torch
import xxhash
from torch import nn


def name_space(**parts: object) -> str:
    """One name for all that features depend on."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def hash_tower(tower: nn.Module) -> str:
    """XXH3-128 of every tensor with its name, type and shape."""
    digest = xxhash.xxh3_128()
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
