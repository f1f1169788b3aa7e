"""Conventions that several foreign layouts share: names of tensors, and what a file leaves unsaid.

OpenAI's names are also those of OpenCLIP; transformers' may stand in a bare file as well as in a folder. Vocabulary and
preprocessing are as OpenAI published them unless something says otherwise.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from diptych import files
from diptych.checkpoint.sources import Published
from diptych.checkpoint.weights.read import Source
from diptych.checkpoint.weights.tensors import short
from diptych.errors import CheckpointError, NotFoundError, UsageError
from diptych.image import Preprocess
from diptych.model.config import CLIPConfig, TextConfig, ViTConfig
from diptych.tokenizer import Tokenizer
from diptych.tokenizer_json import JsonTokenizer, read_tokenizer
from diptych.tokens import FILE_NAME as TOKENIZER_FILE
from diptych.tokens import BaseTokenizer, Clean


def _same(ours: str, theirs: str) -> dict[str, Source]:
    return {f"{ours}.{end}": Source((f"{theirs}.{end}",)) for end in ("weight", "bias")}


_BOTH = {
    "text.token_embedding.weight": Source(("text_model.embeddings.token_embedding.weight",)),
    "text.positional_embedding": Source(("text_model.embeddings.position_embedding.weight",)),
    **_same("text.ln_final", "text_model.final_layer_norm"),
    "visual.conv1.weight": Source(("vision_model.embeddings.patch_embedding.weight",)),
    "visual.positional_embedding": Source(("vision_model.embeddings.position_embedding.weight",)),
    **_same("visual.ln_post", "vision_model.post_layernorm"),
}
_PLACES: Mapping[str, Mapping[str, Source]] = {
    # transformers' class -> ours -> theirs
    "CLIPModel": {
        **_BOTH,
        "logit_scale": Source(("logit_scale",)),
        "text.text_projection": Source(("text_projection.weight",), transpose=True),
        "visual.proj": Source(("visual_projection.weight",), transpose=True),
        "visual.class_embedding": Source(("vision_model.embeddings.class_embedding",)),
        **_same("visual.ln_pre", "vision_model.pre_layrnorm"),
    },
    "SiglipModel": {
        **_BOTH,
        "logit_scale": Source(("logit_scale",), axes=1),
        "logit_bias": Source(("logit_bias",), axes=1),
        "text.text_projection": Source(("text_model.head.weight",), transpose=True),
        "text.projection_bias": Source(("text_model.head.bias",)),
        "visual.conv1.bias": Source(("vision_model.embeddings.patch_embedding.bias",)),
        "visual.attn_pool.latent": Source(("vision_model.head.probe",), axes=2),
        "visual.attn_pool.in_proj.weight": Source(("vision_model.head.attention.in_proj_weight",)),
        "visual.attn_pool.in_proj.bias": Source(("vision_model.head.attention.in_proj_bias",)),
        **_same("visual.attn_pool.out_proj", "vision_model.head.attention.out_proj"),
        **_same("visual.attn_pool.ln", "vision_model.head.layernorm"),
        **_same("visual.attn_pool.mlp.c_fc", "vision_model.head.mlp.fc1"),
        **_same("visual.attn_pool.mlp.c_proj", "vision_model.head.mlp.fc2"),
    },
}
_ENCODERS: Mapping[str, Mapping[str, str]] = {
    # transformers' class -> beginnings of our text tower's names -> theirs
    "ChineseCLIPModel": {"text.transformer.": "text_model.", "text.proj.": "text_projection."},
    "AltCLIPModel": {
        "text.transformer.": "text_model.roberta.",
        "text.proj.0.": "text_model.pre_LN.",
        "text.proj.1.": "text_model.transformation.",
        "text.proj.2.": "text_projection.",
    },
}
_BLOCK_PLACES = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
}
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


def transformers_place(name: str, kind: str = "CLIPModel") -> Source:
    """Where a class of transformers keeps one of our tensors."""
    for ours, theirs in _ENCODERS.get(kind, {}).items():
        if name.startswith(ours):
            return Source((theirs + name.removeprefix(ours),))
    if (place := _PLACES["CLIPModel" if kind in _ENCODERS else kind].get(name)) is not None:
        return place
    match = _OUR_BLOCK.fullmatch(name)
    if match is None:
        raise UsageError(f"{name} has no place in transformers' {kind}")
    tower, number, part, end = match.groups()
    return Source(tuple(f"{_TOWERS[tower]}.encoder.layers.{number}.{theirs}.{end}" for theirs in _BLOCK_PLACES[part]))


def transformers_names(names: Iterable[str]) -> list[str]:
    """Names of our tensors in a file under CLIPModel's names, as many blocks as it has."""
    ours = list(_PLACES["CLIPModel"])
    for tower, theirs in _TOWERS.items():
        blocks = {int(m[2]) for name in names if (m := _THEIR_BLOCK.match(name)) and f"{m[1]}_model" == theirs}
        ours += [
            f"{tower}.transformer.resblocks.{number}.{part}.{end}"
            for number in sorted(blocks)
            for part in _BLOCK_PLACES
            for end in ("weight", "bias")
        ]
    return ours


def transformers_sources(
    names: Mapping[str, str], where: Path, ours: Iterable[str], kind: str = "CLIPModel"
) -> dict[str, Source]:
    """Our names -> tensors of a file under transformers' names. `names` maps clean names to those in the file."""
    found: dict[str, Source] = {}
    for name in ours:
        place = transformers_place(name, kind)
        if missing := [part for part in place.names if part not in names]:
            raise CheckpointError(f"{where} is no complete {kind}: {missing[0]} is missing")
        found[name] = place._replace(names=tuple(names[part] for part in place.names))
    used = {name for source in found.values() for name in source.names}
    if odd := sorted(set(names.values()) - used):
        raise CheckpointError(
            f"{where} is not of the CLIP family that diptych knows: it holds {short(odd[0])}, which {kind} has not"
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


def normal_form(config: CLIPConfig) -> CLIPConfig:
    """The same architecture, where two values mean the same always with one of them: to be compared."""
    vision, text = config.vision, config.text
    if isinstance(vision, ViTConfig):
        ratio = vision.pool_mlp_ratio or vision.mlp_ratio
        vision = replace(
            vision,
            mlp_ratio=vision.mlp_width / vision.width,
            activation=vision.activation or config.activation,
            pool_heads=vision.pool_heads or vision.heads if vision.pool in ("latent", "queries") else None,
            pool_mlp_ratio=round(vision.width * ratio) / vision.width if vision.pool == "latent" else None,
        )
    if isinstance(text, TextConfig):
        end = text.vocab_size - 1 if text.end_id is None else text.end_id
        text = replace(
            text,
            mlp_ratio=text.mlp_width / text.width,
            end_id=end if text.pool == "end" else None,
            pad_id=0 if text.is_trimmed else text.pad_id,  # nothing sees it
        )
    return replace(config, vision=vision, text=text)


def foreign_tokenizer(
    folder: Path, context_length: int, clean: Clean, *, strip_sep_token: bool = False, language: str | None = None
) -> BaseTokenizer:
    """The tokenizer.json of a folder with its family's rules, or what our own tokenizer left beside it."""
    try:
        if (folder / TOKENIZER_FILE).is_file():
            return Tokenizer.load(folder)
        return read_tokenizer(folder, context_length, clean=clean, strip_sep_token=strip_sep_token, language=language)
    except (UsageError, NotFoundError) as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from None


def write_foreign_tokenizer(folder: Path, tokenizer: JsonTokenizer) -> None:
    """tokenizer.json, its settings as transformers and OpenCLIP read them, and all of its rules as we do."""
    tokenizer.save(folder)
    rules = tokenizer.rules
    specials = {"pad_token": rules.pad, "eos_token": rules.end} | ({"sep_token": rules.drop} if rules.drop else {})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.context_length}
    files.write_json(folder / "tokenizer_config.json", settings | specials)
