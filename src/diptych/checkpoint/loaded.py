"""From a checkpoint that was looked into to a model that is ready: what every layout comes down to.

A layout's reader returns `Opened`: everything known before a weight is read, in our terms. `build` holds the weights'
names and shapes against the config, and only then asks for memory.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from diptych.checkpoint.weights.read import Source, Weights
from diptych.checkpoint.weights.tensors import TensorFile, short
from diptych.errors import CheckpointError
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig, ResNetConfig, TimmConfig, TransformersTextConfig
from diptych.tokens import BaseTokenizer


class Loaded(NamedTuple):
    """A model in use, with what belongs to it: the three agree with each other."""

    model: CLIP
    preprocess: Preprocess
    tokenizer: BaseTokenizer

    def turned(self) -> "Loaded":
        """The same, but pictures are turned as their EXIF orientation says."""
        return self._replace(preprocess=replace(self.preprocess, turn=True))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint of any layout, looked into but not read."""

    layout: str
    path: Path
    config: CLIPConfig
    preprocess: Preprocess
    tokenizer: BaseTokenizer
    weights: Weights
    evidence: Mapping[str, str] = field(default_factory=dict)
    """The reason for each choice that the weights do not show: activation, heads, preprocessing."""
    files: tuple[Path, ...] = ()
    """Every file that was used."""


def build(opened: Opened, dtype: torch.dtype = torch.float32) -> Loaded:
    """Read the weights into a model in evaluation mode, all floating tensors as `dtype`.

    Raises CheckpointError if names or shapes do not fit the config, or model, preprocessing and tokenizer each other.
    """
    try:
        check_agreement(opened)
        model = build_meta(opened.config)
        shapes = dict(opened.weights.shapes)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        scalars = [name for name in ("logit_scale", "logit_bias") if name in expected]
        for name in scalars:
            if shapes.get(name) == (1,):  # some of OpenCLIP's models keep them as vectors
                shapes[name] = ()
        counters = {name for name in expected.keys() - shapes.keys() if name.endswith("num_batches_tracked")}
        shapes |= dict.fromkeys(counters, ())
        theirs = {name: ", ".join(source.names) for name, source in opened.weights.sources.items()}
        called = [{theirs.get(name, name): shape for name, shape in some.items()} for some in (expected, shapes)]
        check_shapes(opened.weights.file.paths[0], *called)
        for name, source in opened.weights.sources.items():
            check_dtype(opened.weights.file, name, source)
        weights = opened.weights.read(dtype)
    except CheckpointError:
        opened.weights.check_hash()  # damage explains the rest
        raise
    weights |= {name: weights[name].reshape(()) for name in scalars}
    assign(model, weights | {name: torch.zeros((), dtype=torch.int64) for name in counters})
    return Loaded(model.eval(), opened.preprocess, opened.tokenizer)


def rebuild(config: CLIPConfig, state: Mapping[str, Tensor]) -> CLIP:
    """A model of this config that holds these very tensors."""
    model = build_meta(config)
    assign(model, state)
    return model


def assign(model: CLIP, state: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a model of `build_meta`; buffers that no checkpoint has are computed anew."""
    model.load_state_dict(state, assign=True)
    if not any(buffer.is_meta for buffer in model.buffers()):
        return
    made = _build_buffers(model.config)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            value = made[name].to(model.dtype) if buffer.is_floating_point() else made[name]
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, value)


def build_meta(config: CLIPConfig) -> CLIP:
    """Build a model of names and shapes without memory, on the meta device, in milliseconds.

    Raises CheckpointError for sizes that no tensor can have.
    """
    try:
        with torch.device("meta"), _WithoutInit():
            return CLIP(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"a model of these sizes cannot be built: {short(str(error))}") from None


def _build_buffers(config: CLIPConfig) -> dict[str, Tensor]:
    """The buffers of a model whose weights, once registered, have no memory."""
    own = threading.get_ident()

    def forget(_: nn.Module, __: str, weight: nn.Parameter | None) -> Any:
        return nn.Parameter(weight.to("meta")) if weight is not None and threading.get_ident() == own else None

    hook = register_module_parameter_registration_hook(forget)  # pyright: ignore[reportArgumentType]
    try:
        with _WithoutInit():
            return dict(CLIP(config).named_buffers())
    finally:
        hook.remove()


class _WithoutInit(TorchFunctionMode):
    """Leaves out torch.nn.init: there are no values to set, and its `normal_` imports the compiler for a second."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def check_agreement(opened: Opened) -> None:
    """Raise CheckpointError if config, preprocessing, tokenizer and the file's size contradict each other."""
    config, where = opened.config, opened.path
    if opened.preprocess.image_size != config.vision.image_size:
        raise CheckpointError(
            f"{where}: the model takes pictures of {config.vision.image_size} px, "
            f"its preprocessing makes {opened.preprocess.image_size} px"
        )
    if opened.tokenizer.vocab_size > config.text.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {opened.tokenizer.vocab_size} ids, the model {config.text.vocab_size}"
        )
    if opened.tokenizer.context_length != config.text.context_length:
        raise CheckpointError(
            f"{where}: the tokenizer makes {opened.tokenizer.context_length} tokens a text, "
            f"the model takes {config.text.context_length}"
        )
    check_depth(config, opened.weights.file)


def check_depth(config: CLIPConfig, file: TensorFile) -> None:
    """Raise CheckpointError if a config names more blocks than the file has tensors: before a model of that many is
    built, even without memory."""
    layers = 0 if isinstance(config.vision, TimmConfig) else config.vision.layers
    blocks = config.text.layers + (layers if isinstance(layers, int) else sum(layers))
    if blocks > len(file.entries):
        raise CheckpointError(
            f"{file.paths[0]}: the config names {blocks} blocks, the weights hold fewer tensors than that"
        )


def check_shapes(where: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless names and shapes match to the last."""
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"{where} belongs to another model: {len(missing)} tensors are missing ({_examples(missing)}), "
            f"{len(unexpected)} unexpected ({_examples(unexpected)})"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{where} belongs to another model: {name} has shape {short(list(found[name]))}, not {list(shape)}"
            )


def check_dtype(file: TensorFile, name: str, source: Source) -> None:
    """Raise CheckpointError if a tensor has a type that its part of the model cannot have."""
    counts = name.endswith("num_batches_tracked")
    for part in source.names:
        dtype = file.entries[part].dtype
        if dtype.is_floating_point == counts:
            raise CheckpointError(f"{file.paths[0]}: {part} has type {dtype}, which is no type for {name}")


_SIZES = frozenset(
    ["image_size", "patch_size", "width", "layers", "heads", "mlp_ratio", "context_length", "vocab_size"]
)


def why_not_paper(config: CLIPConfig) -> str | None:
    """Why this is not the paper's architecture in some size, if so: some layouts know no other."""
    towers = {"image": config.vision, "text": config.text}
    for name, tower in towers.items():
        if isinstance(tower, ResNetConfig):
            continue
        if isinstance(tower, TimmConfig | TransformersTextConfig):
            library = "timm" if isinstance(tower, TimmConfig) else "transformers"
            return f"its {name} tower is a model of {library}"
        others = {f.name: getattr(tower, f.name) for f in fields(tower) if f.name not in _SIZES}
        defaults = {f.name: f.default for f in fields(tower)}
        if odd := [f"{key} {value}" for key, value in others.items() if value != defaults[key]]:
            return f"its {name} tower is not the paper's: {', '.join(odd)}"
    if config.logit_bias:
        return "its logits have a bias, for the sigmoid loss; readers of this layout would drop it"
    return None


def _examples(names: set[str]) -> str:
    return short(", ".join(sorted(names)[:3])) or "none"
