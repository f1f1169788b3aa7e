"""Weights and inputs from names alone, so that two libraries can be given the same ones without a file between them."""

import hashlib

import numpy as np

CONFIGS = {
    "vit-quickgelu": ({"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "heads": 2}, 24, True),
    "vit-gelu": ({"image_size": 48, "patch_size": 16, "width": 128, "layers": 2, "heads": 2}, 32, False),
    "resnet": ({"image_size": 64, "layers": (1, 2, 1, 1), "width": 8}, 40, True),
    "resnet-deep": ({"image_size": 96, "layers": (3, 1, 2, 2), "width": 16}, 16, True),
}
"""Name: image tower, embed_dim, and whether the activation is QuickGELU."""

TEXT = {"context_length": 20, "vocab_size": 49408, "width": 64, "layers": 3, "heads": 4}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name in OpenAI's layout: float32, of a size that keeps activations near 1."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    values = rng.standard_normal(shape)
    if not shape:
        return np.float32(2.5)  # the temperature, a logarithm
    if name.endswith("running_var"):
        return (1 + 0.2 * np.abs(values)).astype(np.float32)
    if name.endswith(("running_mean", "bias")):
        return (0.1 * values).astype(np.float32)
    if len(shape) <= 1 and name.endswith("weight"):
        return (1 + 0.1 * values).astype(np.float32)  # a gain
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
    if name.endswith(("proj", "text_projection")):
        fan_in = shape[0]
    return (values / np.sqrt(fan_in)).astype(np.float32)


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """All tensors of a state dict; counters stay out."""
    return {name: draw(name, shape) for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}


def inputs(
    image_size: int,
    context_length: int = TEXT["context_length"],
    vocab_size: int = TEXT["vocab_size"],
    pictures: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures float32 [N, 3, H, W] and texts int64 [3, L] of 2, 9 and L tokens."""
    rng = np.random.default_rng(image_size)
    text = np.zeros((3, context_length), dtype=np.int64)
    for row, length in zip(text, (2, 9, context_length), strict=True):
        row[:length] = rng.integers(1, vocab_size - 2, length)
        row[0], row[length - 1] = vocab_size - 2, vocab_size - 1
    return rng.standard_normal((pictures, 3, image_size, image_size)).astype(np.float32), text
