"""Small real things for tests: pictures, pairs, shards, models."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from diptych.checkpoint.loaded import Loaded
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from diptych.pair import Pair
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.write import write_shards
from diptych.tokenizer import Tokenizer
from diptych.train.config import OptimConfig, RunConfig, StartConfig, TrainConfig

COLOURS = ["red", "green", "blue", "orange", "purple", "black", "gray", "brown"]
LONG = {("brown", "ring"): " on a large and very plain white page", ("red", "dot"): " in the middle of a white page"}
SHAPES = ["circle", "square", "triangle", "cross", "bar", "ring", "corner", "dot"]


def draw(colour: str, shape: str, size: int = 40) -> Image.Image:
    """A coloured shape on white."""
    image = Image.new("RGB", (size, size), "white")
    pen, s = ImageDraw.Draw(image), size
    match shape:
        case "circle":
            pen.ellipse((s * 0.1, s * 0.1, s * 0.9, s * 0.9), fill=colour)
        case "square":
            pen.rectangle((s * 0.15, s * 0.15, s * 0.85, s * 0.85), fill=colour)
        case "triangle":
            pen.polygon([(s * 0.5, s * 0.1), (s * 0.1, s * 0.9), (s * 0.9, s * 0.9)], fill=colour)
        case "cross":
            pen.rectangle((s * 0.4, 0, s * 0.6, s), fill=colour)
            pen.rectangle((0, s * 0.4, s, s * 0.6), fill=colour)
        case "bar":
            pen.rectangle((0, s * 0.35, s, s * 0.65), fill=colour)
        case "ring":
            pen.ellipse((s * 0.1, s * 0.1, s * 0.9, s * 0.9), outline=colour, width=size // 8)
        case "corner":
            pen.polygon([(0, 0), (s, 0), (0, s)], fill=colour)
        case "dot":
            pen.ellipse((s * 0.4, s * 0.4, s * 0.6, s * 0.6), fill=colour)
    return image


def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 95} if format == "JPEG" else {}) | options)
    return buffer.getvalue()


def make_pairs(count: int = 64) -> list[Pair]:
    """Up to 64 pairs, all different; two captions are long, so that batches differ."""
    everything = [(colour, shape) for colour in COLOURS for shape in SHAPES][:count]
    return [
        Pair(
            key=f"{c}-{s}",
            caption=f"a {c} {s}{LONG.get((c, s), '')}",
            image=encode(draw(c, s)),
            details={"source": "drawn", "label": s},
        )
        for c, s in everything
    ]


def write_samples(folder: Path, count: int = 64, samples_per_shard: int = 20) -> Path:
    write_shards(make_pairs(count), folder, samples_per_shard=samples_per_shard)
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A foreign tar with exactly these members."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def noise(size: tuple[int, int] = (37, 53), seed: int = 0, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


TINY_TEXT = TextConfig(context_length=16, width=32, layers=2, heads=2)
TINY_VIT = CLIPConfig(
    embed_dim=24, vision=ViTConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2), text=TINY_TEXT
)
TINY_RESNET = CLIPConfig(embed_dim=24, vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=4), text=TINY_TEXT)


SMALL_VOCABULARY = Tokenizer(("t h", "th e</w>", "c a", "ca t</w>", "a n", "an d</w>"), context_length=16)


def small(config: CLIPConfig, **changes) -> CLIPConfig:
    """A tiny model of a tiny vocabulary, 64 channels a head: what a bare file can hold, in 0.3 MB."""
    text = replace(config.text, vocab_size=SMALL_VOCABULARY.vocab_size, width=64, layers=1, heads=1)
    vision = config.vision
    if isinstance(vision, ViTConfig):
        vision = replace(vision, width=64, layers=1, heads=1)
    return replace(config, vision=vision, text=text, **changes)


def make_loaded(config: CLIPConfig, tokenizer: Tokenizer | None = None, seed: int = 0, **preprocess) -> Loaded:
    """A model of random weights, whose every tensor is random: biases and BatchNorm statistics too."""
    torch.manual_seed(seed)
    model = CLIP(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and name != "logit_scale":
                tensor.normal_(std=0.05 + (tensor.ndim > 1) * tensor[0].numel() ** -0.5 if tensor.ndim else 0.05)
                if tensor.ndim == 1 and name.endswith("weight"):
                    tensor.add_(1)
    tokenizer = tokenizer or (SMALL_VOCABULARY if config.text.vocab_size == 520 else Tokenizer.clip(16))
    return Loaded(model, Preprocess(image_size=config.vision.image_size, **preprocess), tokenizer)


def train_config(data: Path, out: Path, *, model: CLIPConfig = TINY_VIT, steps: int = 20, **changes) -> TrainConfig:
    return TrainConfig(
        model=model,
        data=(SourceConfig(path=data),),
        out=out,
        loader=LoaderConfig(
            batch_size=changes.pop("batch_size", 16),
            workers=changes.pop("workers", 0),
            augment=changes.pop("augment", True),
        ),
        start_model=changes.pop("start_model", None),
        start=StartConfig(**changes.pop("start", {})),
        optim=OptimConfig(
            lr=changes.pop("lr", 1e-3),
            warmup=changes.pop("warmup", 2),
            half_statistics=changes.pop("half_statistics", False),
        ),
        run=RunConfig(steps=steps, precision="float32", device="cpu", **changes),
    )
