"""Bare files of weights under OpenAI's names: released TorchScript archives, state dicts of OpenAI and OpenCLIP.

Such a file holds tensors and nothing else. Sizes follow from the shapes (`infer`), preprocessing is OpenAI's, and the
activation must be shown by something: the class names inside a TorchScript archive, a file that was published and
whose hash is known, or the caller. If nothing shows it the file is refused, naming the two choices.

    logit_scale                                     text.* in ours
    token_embedding  positional_embedding  transformer.resblocks.0...  ln_final  text_projection
    visual.conv1  visual.class_embedding  visual.transformer.resblocks.0...  visual.proj     (ViT)
    visual.conv1  visual.bn1  visual.layer1.0...  visual.attnpool...                         (ResNet)
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from diptych.checkpoint.formats.conventions import (
    bare_tokenizer,
    openai_sources,
    openai_state,
    published_preprocess,
    transformers_names,
    transformers_sources,
)
from diptych.checkpoint.formats.infer import CHANNELS_PER_HEAD, infer_config
from diptych.checkpoint.loaded import Loaded, Opened, why_not_paper
from diptych.checkpoint.sources import Published, find_published
from diptych.checkpoint.weights.read import Source, Weights, clean_names, read_tensor_file
from diptych.checkpoint.weights.tensors import TensorFile
from diptych.errors import ActivationUnknownError, CheckpointError
from diptych.image import Preprocess
from diptych.model.config import Activation, ViTConfig, check_activation
from diptych.tokenizer import Tokenizer

_ACTIVATION_CLASSES: Mapping[str, Activation] = {"QuickGELU": "quick_gelu", "GELU": "gelu"}


class Evidence(NamedTuple):
    """An activation and what it was concluded from."""

    activation: Activation
    reason: str


def open_file(
    path: Path, activation: Activation | None = None, preset: str | None = None, published: Published | None = None
) -> Opened:
    """Look into a bare file of weights under OpenAI's, OpenCLIP's or transformers' names."""
    file = read_tensor_file(path)
    names = clean_names(file, path)
    of_transformers = any(name.startswith(("text_model.", "vision_model.")) for name in names)
    sources = transformers_sources(names, path, transformers_names(names)) if of_transformers else openai_sources(names)
    if sources.keys() >= {"text.positional_embedding", _REST}:
        file, sources = join_positions(file, sources)
    weights = Weights(file=file, sources=sources)
    published = published or find_published(path)
    shapes = weights.shapes
    evidence = decide_activation(path, file, activation, published)
    config, heads = infer_config(shapes, evidence.activation, preset, path, file.entries.keys())
    preprocess = published_preprocess(published, config.vision.image_size)
    return Opened(
        layout="transformers weights" if of_transformers else "TorchScript archive" if file.classes else "state dict",
        path=path,
        config=config,
        preprocess=preprocess,
        tokenizer=bare_tokenizer(path, config),
        weights=weights,
        evidence={
            "activation": evidence.reason,
            "heads": heads,
            "preprocessing": f"published as {published.name}" if published else "OpenAI's, since the file does not say",
        },
        files=file.paths,
    )


_REST, _KEPT = "text.positional_embedding_res", 20


def join_positions(file: TensorFile, sources: Mapping[str, Source]) -> tuple[TensorFile, dict[str, Source]]:
    """LongCLIP (Zhang et al. 2024) has two tables of positions: the first 20 count of one, all others of the other."""
    sources = dict(sources)
    (one,), (other,) = sources["text.positional_embedding"].names, sources.pop(_REST).names
    table = file.entries[one]
    if len(table.shape) != 2 or table.shape != file.entries[other].shape or table.shape[0] <= _KEPT:
        raise CheckpointError(f"{file.paths[0]}: {one} and {other} are not two tables of LongCLIP's positions")
    length, width = table.shape
    parts = {}
    for name, begin, end in ((one, 0, _KEPT), (other, _KEPT, length)):
        whole = file.entries[name]
        stride = whole.stride or (width, 1)
        parts[f"{name}[{begin}:{end}]"] = replace(
            whole, shape=(end - begin, width), stride=stride, offset=whole.offset + begin * stride[0]
        )
    sources["text.positional_embedding"] = Source(tuple(parts))
    return replace(file, entries={**file.entries, **parts}), sources


def decide_activation(path: Path, file: TensorFile, given: Activation | None, published: Published | None) -> Evidence:
    """Decide which activation these weights were trained with; ActivationUnknownError if nothing shows it."""
    if given is not None:
        return Evidence(check_activation(given), "given by the caller")
    classes = {cls for module, cls in file.classes.items() if module.endswith("mlp.gelu")}
    if len(classes) == 1 and (found := _ACTIVATION_CLASSES.get(next(iter(classes)))):
        return Evidence(found, f"the archive's modules are of class {next(iter(classes))}")
    if published is not None:
        return Evidence(published.activation, f"published as {published.name}")
    raise ActivationUnknownError(
        f"{path} does not say which activation it was trained with, and the wrong one gives worse features silently: "
        "say activation='quick_gelu' (OpenAI's weights, the first of LAION-400M, MetaCLIP, DFN) or activation='gelu' "
        "(most of OpenCLIP's); on the command line --activation"
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def why_not(loaded: Loaded) -> str | None:
    """Why OpenAI's state dict cannot hold this model: whoever reads it takes the rest for granted."""
    config = loaded.model.config
    if config.activation != "quick_gelu":
        return "its activation is GELU, and OpenAI's loader always computes QuickGELU"
    towers = [config.text, *([config.vision] if isinstance(config.vision, ViTConfig) else [])]
    if any(tower.width != tower.heads * CHANNELS_PER_HEAD for tower in towers):
        return "OpenAI's loader takes 64 channels a head for granted"
    if any(tower.mlp_width != 4 * tower.width for tower in towers):
        return "OpenAI's loader takes an MLP of 4 times the width for granted"
    if reason := why_not_paper(config):
        return reason
    if loaded.preprocess != Preprocess(image_size=config.vision.image_size):
        return "its preprocessing is not OpenAI's, and a bare file cannot say so"
    if loaded.tokenizer.fingerprint != Tokenizer.clip().fingerprint:
        return "its vocabulary is not OpenAI's, and a bare file cannot say so"
    return None


def write(path: Path, loaded: Loaded) -> None:
    """Write a state dict under OpenAI's names with torch.save."""
    with open(path, "wb") as file:  # a file, not its name, which torch would write into the archive
        torch.save(openai_state(loaded.model.state_dict().items()), file)
