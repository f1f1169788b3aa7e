"""`diptych inspect`, `convert` and `verify`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from diptych.checkpoint.config import LayoutName, Resize, WeightsDtype
from diptych.cli.output import printable
from diptych.model.config import Activation


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a checkpoint is: architecture, activation and what shows it, preprocessing, tokenizer, types, hashes.

    Example: diptych inspect ViT-B-32.pt
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai)."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __call__(self) -> int:
        from diptych.checkpoint.inspect import inspect

        found = inspect(self.model, activation=self.activation, preset=self.preset)
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            print_inspection(found)
        return 0


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint in another layout; features before and after must agree, or nothing is written.

    Example: diptych convert ViT-B-32.pt out --to open_clip
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The new folder, or file (openai)."""
    to: LayoutName
    """The layout: our own folder, OpenCLIP's, transformers' (ViT only), OpenAI's state dict, or ONNX (no way back)."""
    precision: WeightsDtype = "float32"
    """Type of the weights that are written."""
    image_size: int | None = None
    """Resize the image tower's positions for pictures of another size, pixels."""
    resize: Resize = "open_clip"
    """How they are resized: bicubic with antialiasing (open_clip) or without (transformers)."""
    context_length: int | None = None
    """Make the text tower take another number of tokens."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""
    overwrite: bool = False
    """Replace a checkpoint that is there."""

    def __call__(self) -> int:
        from diptych.checkpoint import layouts, surgery

        layouts.check_place(self.out, self.to, overwrite=self.overwrite)  # before minutes of work
        loaded = layouts.load(self.model, activation=self.activation, preset=self.preset)
        if self.image_size is not None:
            loaded = surgery.resize_image(loaded, self.image_size, self.resize)
        if self.context_length is not None:
            loaded = surgery.resize_context(loaded, self.context_length)
        differences = layouts.convert(loaded, self.out, self.to, precision=self.precision, overwrite=self.overwrite)
        resized = self.image_size is not None or self.context_length is not None
        what = "of the resized model and of what was written" if resized else "before and after"
        for tower, difference in differences.items():
            print(f"{tower} features {what} differ by {difference:.1e} of their length")
        print(f"written: {printable(self.out)} ({self.to}, {self.precision})")
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read a checkpoint to its last byte: hashes, finite numbers, one forward pass.

    Example: diptych verify runs/mine
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai)."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""

    def __call__(self) -> int:
        from diptych.checkpoint.inspect import verify

        found = verify(self.model, activation=self.activation, preset=self.preset)
        for name, sha256 in found.sha256.items():
            against = found.checked_against.get(name)
            print(f"sha256 {sha256}  {printable(name)}" + (f"  (agrees with {printable(against)})" if against else ""))
        print(f"{found.tensors} tensors, every number finite; temperature {found.temperature:.4g}")
        print(f"forward pass: {found.features}")
        print("sound" if found.checked_against else "sound, as far as a file without a stored hash can show")
        return 0


def print_inspection(found: dict[str, Any]) -> None:
    """What `diptych inspect` found, a line for each answer."""
    model, preprocess, tokenizer = found["model"], found["preprocess"], found["tokenizer"]
    vision, text, count = model["vision"], model["text"], found["parameters"]
    evidence = found["evidence"]
    if vision["type"] == "TimmConfig":
        tower = f"timm's {vision['name']}"
    elif vision["type"] == "ResNetConfig":
        tower = f"ResNet, blocks {vision['layers']}, width {vision['width']}"
    else:
        blocks = f"{vision['layers']} layers of {vision['heads']} heads"
        tower = f"ViT, patch {vision['patch_size']}, width {vision['width']}, {blocks}"
    if text.get("type") == "TransformersTextConfig":
        words = f"transformers' {json.loads(text['architecture'])['model_type']}, pool {text['pool']}"
    else:
        words = f"width {text['width']}, {text['layers']} layers of {text['heads']} heads"
    resize = {"shorter_side": "shorter side, centre crop", "squash": "squashed to a square"}[preprocess["resize"]]
    lines = {
        "path": found["path"],
        "layout": found["layout"],
        "architecture": found["architecture"],
        "image tower": f"{tower}, {vision['image_size']} px; {count['image']:,} parameters",
        "text tower": f"{words}, {text['context_length']} tokens; {count['text']:,} parameters",
        "embedding": f"{model['embed_dim']} dimensions; {count['total']:,} parameters in all",
        "activation": f"{found['activation'] or 'not known'} ({evidence['activation']})",
        "preprocessing": f"{preprocess['image_size']} px, {preprocess['interpolation']}, {resize}; "
        f"mean {_numbers(preprocess['mean'])}, std {_numbers(preprocess['std'])}",
        "tokenizer": f"{tokenizer['vocabulary']} vocabulary, {tokenizer['vocab_size']:,} ids",
        "type": ", ".join(f"{name} {share:,}" for name, share in found["dtype"].items()),
    }
    if "heads" in evidence:
        lines["text tower"] += f" (heads: {evidence['heads']})"
    if "preprocessing" in evidence:
        lines["preprocessing"] += f" ({evidence['preprocessing']})"
    for name, answer in lines.items():
        print(f"{name + ':':15} {printable(answer)}")
    for name, file in found["files"].items():
        print(f"{'file:':15} {printable(name)}  {file['bytes']:,} bytes  sha256 {file['sha256']}")


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
