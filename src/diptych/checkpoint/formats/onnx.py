"""Towers as ONNX files, for programs without PyTorch: `image.onnx`, `text.onnx`.

    image  float32 [N, 3, H, W], preprocessed     -> image_features  float32 [N, E], not normalised
    text   int64 [N, context_length], padded      -> text_features   float32 [N, E], not normalised

N is free. What is written is run by onnxruntime on drawn inputs and held against the model before it counts. The files
hold a computation; they cannot be read back into a model.
"""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.errors import UsageError, install
from diptych.model.clip import CLIP, TextTower
from diptych.model.text_encoder import TransformersText
from diptych.model.transformer import Sight

OPSET = 20
FILES = {"image": "image.onnx", "text": "text.onnx"}
_REGISTRY = "torch.onnx._internal.exporter._registration"


class PlainText(nn.Module):
    """The text tower without its shortcuts: every token of every text is computed, none is sorted.

    The same features; what the towers save depends on the captions, which a fixed graph cannot.
    """

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, text: Int[Tensor, "N L"]) -> Float[Tensor, "N E"]:
        tower = self.tower
        if isinstance(tower, TransformersText):
            return tower.encode(text)
        if tower.config.is_trimmed:  # of any length
            x = tower.token_embedding(text) + tower.positional_embedding[: text.shape[1]]  # [N, L, D]
            sight = Sight(is_causal=True)
        else:
            x, sight = tower.embed(text)
        x, read = tower.transformer(x, None, sight), tower.get_read(text)
        return tower.project(x.gather(1, read[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0])


def export(model: CLIP, folder: Path) -> None:
    """Write both towers, in evaluation mode, into a folder.

    Raises UsageError if a package is missing or the model is not float32.
    """
    require_packages()
    if model.dtype != torch.float32:
        raise UsageError(f"ONNX files are written in float32, the model is {model.dtype}; use precision float32")
    with _evaluating(model):
        for tower, module in _modules(model).items():
            _export(module, _example(model, tower, 2), folder / FILES[tower], tower)


def compare(model: CLIP, folder: Path) -> dict[str, float]:
    """Largest difference between onnxruntime's features and the model's, relative to their length, by tower."""
    import onnxruntime

    differences = {}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for tower, name in FILES.items():
        session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        encode = model.encode_image if tower == "image" else model.encode_text
        largest = 0.0
        for count in (1, 3, 8):
            example = _example(model, tower, count)
            (theirs,) = session.run(None, {tower: example.numpy()})
            with _evaluating(model), torch.inference_mode():
                ours = encode(example)
            difference = (torch.from_numpy(theirs) - ours).norm(dim=-1) / ours.norm(dim=-1)
            largest = max(largest, difference.max().item())
        differences[tower] = largest
    return differences


def require_packages() -> None:
    """Raise UsageError unless everything that writing and checking needs is installed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"writing ONNX needs the package {package}; {install('onnx')}")


def _modules(model: CLIP) -> dict[str, nn.Module]:
    return {"image": model.visual, "text": PlainText(model.text).eval()}


def _example(model: CLIP, tower: str, count: int) -> Tensor:
    """Drawn pictures, or texts of every length between two tokens and all."""
    generator = torch.Generator().manual_seed(count)
    if tower == "image":
        size = model.config.vision.image_size
        return torch.randn(count, 3, size, size, generator=generator)
    config = model.config.text
    text = torch.randint(1, config.vocab_size - 2, (count, config.context_length), generator=generator)
    for row, length in zip(text, torch.linspace(2, config.context_length, count).int().tolist(), strict=True):
        row[0], row[length - 1], row[length:] = config.vocab_size - 2, config.vocab_size - 1, 0
    return text


def _export(module: nn.Module, example: Tensor, path: Path, tower: str) -> None:
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            module,
            (example,),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tower],
            output_names=[f"{tower}_features"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            external_data=sum(p.nbytes for p in module.parameters()) > 1 << 30,  # protobuf ends at 2 GiB
            verbose=False,
        )


@contextlib.contextmanager
def _evaluating(model: CLIP) -> Iterator[None]:
    """Evaluation mode for a while; then every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter copies a deprecated class of its own and misses torchvision: no concern of who calls it."""
    logger = logging.getLogger(_REGISTRY)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
