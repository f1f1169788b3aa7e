"""Conventions that several foreign layouts share: names of tensors, and what a file leaves unsaid.

OpenAI's names are also those of OpenCLIP; transformers' may stand in a bare file as well as in a folder. Vocabulary and
preprocessing are as OpenAI published them unless something says otherwise.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from diptych.checkpoint.sources import Published
from diptych.checkpoint.weights.read import Source
from diptych.checkpoint.weights.tensors import short
from diptych.errors import CheckpointError, UsageError
from diptych.image import Preprocess
from diptych.model.config import CLIPConfig
from diptych.tokenizer import Tokenizer
from diptych.tokens import FILE_NAME as TOKENIZER_FILE
from diptych.tokens import BaseTokenizer

_PLACES = {
    # ours -> theirs
    "logit_scale": "logit_scale",
    "text.text_projection": "text_projection.weight",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final.weight": "text_model.final_layer_norm.weight",
    "text.ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_BLOCK_PLACES = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
}
TRANSPOSED = frozenset({"text.text_projection", "visual.proj"})
_TOWERS = {"text": "text_model", "visual": "vision_model"}
_OUR_BLOCK = re.compile(r"(text|visual)\.transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_THEIR_BLOCK = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d{1,4})\.")


# --- names ----------------------------------------------------------------------------------------------------------


def openai_sources(names: Mapping[str, str]) -> dict[str, Source]:
    """Our names -> tensors of the file, from OpenAI's names or those of OpenCLIP's CustomTextCLIP."""
    return {from_openai(name): Source((given,)) for name, given in names.items()}


def from_openai(name: str) -> str:
    """`transformer.resblocks.0.attn.in_proj_weight` -> `text.transformer.resblocks.0.attn.in_proj.weight`."""
    name = name.replace(".in_proj_", ".in_proj.")
    return name if name == "logit_scale" or name.startswith(("visual.", "text.", "logit_bias")) else f"text.{name}"


def to_openai(name: str) -> str:
    """The way back; `text.` is left out, as in OpenAI's and OpenCLIP's plain `CLIP`."""
    return name.removeprefix("text.").replace(".in_proj.", ".in_proj_")


def openai_state(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Our tensors under OpenAI's names, on the CPU."""
    return {to_openai(name): tensor.detach().cpu().contiguous() for name, tensor in tensors}


def transformers_places(name: str) -> tuple[str, ...]:
    """Where transformers keeps one of our tensors; several places are joined along the first axis."""
    if name in _PLACES:
        return (_PLACES[name],)
    match = _OUR_BLOCK.fullmatch(name)
    if match is None:
        raise UsageError(f"{name} has no place in transformers' CLIPModel")
    tower, number, part, end = match.groups()
    return tuple(f"{_TOWERS[tower]}.encoder.layers.{number}.{theirs}.{end}" for theirs in _BLOCK_PLACES[part])


def transformers_sources(names: Mapping[str, str], where: Path) -> dict[str, Source]:
    """Our names -> tensors of a file under transformers' names. `names` maps clean names to those in the file."""
    ours = dict.fromkeys(_PLACES)
    for tower, theirs in _TOWERS.items():
        blocks = {int(m[2]) for name in names if (m := _THEIR_BLOCK.match(name)) and f"{m[1]}_model" == theirs}
        ours |= dict.fromkeys(
            f"{tower}.transformer.resblocks.{number}.{part}.{end}"
            for number in sorted(blocks)
            for part in _BLOCK_PLACES
            for end in ("weight", "bias")
        )
    found: dict[str, Source] = {}
    for name in ours:
        wanted = transformers_places(name)
        if missing := [place for place in wanted if place not in names]:
            raise CheckpointError(f"{where} is no complete CLIPModel: {missing[0]} is missing")
        found[name] = Source(tuple(names[place] for place in wanted), transpose=name in TRANSPOSED)
    used = {name for source in found.values() for name in source.names}
    if odd := sorted(set(names.values()) - used):
        raise CheckpointError(
            f"{where} is not of the CLIP family that diptych knows: it holds {short(odd[0])}, which CLIPModel has not"
        )
    return found


# --- what is not said ------------------------------------------------------------------------------------------------


def published_preprocess(published: Published | None, image_size: int) -> Preprocess:
    """OpenAI's preprocessing, where the published weights say nothing else."""
    names = ("mean", "std", "resize", "interpolation")
    known = {name: value for name in names if published and (value := getattr(published, name)) is not None}
    return Preprocess(image_size=image_size, **known)


def bare_tokenizer(path: Path, config: CLIPConfig) -> BaseTokenizer:
    """The released vocabulary, or a tokenizer of ours that lies beside the file."""
    if (path.parent / TOKENIZER_FILE).is_file():
        return Tokenizer.load(path.parent)
    stock = Tokenizer.clip(max(3, config.text.context_length))
    if config.text.vocab_size != stock.vocab_size:
        raise CheckpointError(
            f"{path} has a vocabulary of {config.text.vocab_size} ids, the released one has {stock.vocab_size}; "
            f"put its {TOKENIZER_FILE} beside it (Tokenizer.save)"
        )
    return stock
