"""Text encoders of transformers that a CLIP may have as its text tower: what their configs say, without transformers.

A table holds, for each model type, every setting that its encoder computes with, and what transformers takes where a
`config.json` leaves it out; another holds the models that OpenCLIP's configs name, whose `config.json` it fetches. An
architecture is all of it as one line of JSON, so that equal architectures are equal strings.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

from diptych.errors import UsageError

Settings = Mapping[str, Any]

_BERT: Settings = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
MODEL_TYPES: Mapping[str, Settings] = {
    "bert": _BERT,
    "chinese_clip_text_model": _BERT,  # the same encoder
    "roberta": {**_BERT, "vocab_size": 50265, "pad_token_id": 1},
    "xlm-roberta": {**_BERT, "pad_token_id": 1},
    "altclip_text_model": {  # the same encoder, and a projection to its teacher's width
        **_BERT,
        "vocab_size": 250002,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "attention_probs_dropout_prob": 0,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "project_dim": 768,
    },
    "m2m_100": {  # NLLB; the encoder alone
        "vocab_size": 128112,
        "d_model": 1024,
        "encoder_layers": 12,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "encoder_layerdrop": 0.05,
        "activation_function": "relu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "max_position_embeddings": 1024,
        "scale_embedding": True,
        "pad_token_id": 1,
    },
    "mt5": {  # the encoder alone
        "vocab_size": 250112,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
    },
}
"""By transformers' `model_type`, with its defaults (5.23)."""
_XLM_ROBERTA: Settings = {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1}
_LARGE: Settings = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
PUBLISHED: Mapping[str, Settings] = {
    "roberta-base": {
        "model_type": "roberta",
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "xlm-roberta-base": {"model_type": "xlm-roberta", "layer_norm_eps": 1e-5, **_XLM_ROBERTA},
    "xlm-roberta-large": {"model_type": "xlm-roberta", "layer_norm_eps": 1e-5, **_XLM_ROBERTA, **_LARGE},
    "facebook/nllb-200-distilled-600M": {"model_type": "m2m_100", "vocab_size": 256206, "encoder_layerdrop": 0},
    "facebook/nllb-200-distilled-1.3B": {
        "model_type": "m2m_100",
        "vocab_size": 256206,
        "encoder_layers": 24,
        "encoder_ffn_dim": 8192,
        "encoder_layerdrop": 0,
    },
    "google/mt5-base": {"model_type": "mt5", "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "google/mt5-xl": {"model_type": "mt5", "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
}
"""What the `config.json` of the models that OpenCLIP's configs name says beside the defaults."""
_REFUSED: Settings = {
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "position_embedding_type": "absolute",
}
"""Settings that make another encoder of it unless they have this value."""
_WIDTH, _LAYERS = ("hidden_size", "d_model"), ("num_hidden_layers", "encoder_layers", "num_layers")
_HEADS = ("num_attention_heads", "encoder_attention_heads")
_MOST = {"vocab_size": 1 << 24, "pad_token_id": 1 << 24, "max_position_embeddings": 1 << 14}
"""The most of what may be more than 65,536, and of what makes buffers that no weights can be held to."""


def write_architecture(record: Settings) -> str:
    """transformers' config -> an architecture. What its encoder does not compute with is left out.

    Raises UsageError for another kind of model.
    """
    kind = record.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise UsageError(
            f"a text tower of transformers' type {str(kind)[:80]!r}; diptych knows {', '.join(MODEL_TYPES)}"
        )
    odd = [key for key, value in _REFUSED.items() if record.get(key, value) != value]
    if odd or record.get("position_embedding_type", "absolute") != "absolute":
        raise UsageError(
            f"its text tower has {odd[0] if odd else 'position_embedding_type'}, which diptych does not know"
        )
    known = MODEL_TYPES[kind]
    return json.dumps(
        {"model_type": kind, **known, **{key: record[key] for key in known if key in record}}, sort_keys=True
    )


@functools.lru_cache(maxsize=64)
def read_architecture(architecture: str) -> Settings:
    """The settings of an architecture; UsageError for what `write_architecture` does not write."""
    try:
        record = json.loads(architecture)
        canonical = write_architecture(record if isinstance(record, dict) else {})
    except (ValueError, RecursionError) as error:
        raise UsageError(f"an architecture that cannot be read: {str(error)[:200]}") from None
    if canonical != architecture:
        raise UsageError("an architecture with other keys than those of its model type, or in another order")
    for key, value in record.items():
        if key == "model_type":
            continue
        default = MODEL_TYPES[record["model_type"]][key]
        if isinstance(default, float) or key.endswith("dropout_prob"):
            fits = type(value) in (int, float) and 0 <= value < 1
        elif type(default) is int:
            fits = type(value) is int and 0 < value + (key == "pad_token_id") <= _MOST.get(key, 1 << 16)
        else:
            fits = type(value) is type(default) and len(str(value)) < 40
        if not fits:
            raise UsageError(f"an architecture whose {key} is {str(value)[:80]}")
    if not 0 <= record["pad_token_id"] < record["vocab_size"]:
        raise UsageError(f"pad_token_id {record['pad_token_id']} is none of {record['vocab_size']} tokens")
    if _one(record, _LAYERS) > 1000 or any(_one(record, _WIDTH) % record[key] for key in _HEADS if key in record):
        raise UsageError("an architecture whose heads do not divide its width, or of more than 1000 layers")
    return record


def _one(record: Settings, names: tuple[str, ...]) -> int:
    return next(record[name] for name in names if name in record)


def get_width(architecture: str) -> int:
    """Channels of an architecture's residual stream."""
    return _one(read_architecture(architecture), _WIDTH)


def get_layers(architecture: str) -> int:
    """Blocks of an architecture."""
    return _one(read_architecture(architecture), _LAYERS)


def get_positions(architecture: str) -> int | None:
    """Tokens that an architecture has positions for; None: any number."""
    record = read_architecture(architecture)
    if "roberta" in record["model_type"] or record["model_type"] == "altclip_text_model":
        return record["max_position_embeddings"] - record["pad_token_id"] - 1  # numbered from behind the padding
    return record["max_position_embeddings"] if record["model_type"] in ("bert", "chinese_clip_text_model") else None
