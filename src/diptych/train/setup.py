"""What a run is made of, from its config: precision, tokenizer, a model before its first step."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from diptych.config import from_dict, to_dict
from diptych.errors import NotFoundError, UsageError
from diptych.model.clip import CLIP
from diptych.model.inference.precision import has_fast_bfloat16
from diptych.tokenizer import Tokenizer
from diptych.train.config import RunConfig, TrainConfig
from diptych.train.loss import initial_logit_bias


def build_model(config: TrainConfig) -> CLIP:
    """The model before its first step: random weights by the seed; the sigmoid loss begins as its paper says."""
    torch.manual_seed(config.loader.seed)
    model = CLIP(config.model)
    if model.logit_bias is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10))  # Zhai et al. 2023, section 3.2
            model.logit_bias.fill_(initial_logit_bias(config.loader.batch_size))
    return model


def choose_dtype(run: RunConfig, device: torch.device) -> torch.dtype:
    """The type of the towers' matrix products; `auto` asks the processor, not the clock, so it is the same again."""
    if run.precision == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return torch.bfloat16 if run.precision == "bfloat16" else torch.float32


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of the run; it must fit the text tower."""
    text = config.model.text
    if config.tokenizer is not None and not config.tokenizer.is_dir():
        raise NotFoundError(f"no such tokenizer folder: {config.tokenizer}")
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else Tokenizer.clip()
    if tokenizer.vocab_size != text.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the text tower {text.vocab_size}; they must agree"
        )
    return replace(tokenizer, context_length=text.context_length)


FREE_LOADER = ("batch_size", "workers", "prefetch", "cache", "cache_bytes")
FREE_RUN = (
    *("checkpoint_every", "checkpoint_minutes", "keep_last", "keep_best", "mirror", "evaluate_every", "log"),
    *("device", "micro_batch_size", "sharding", "recompute", "timeout", "extend_to"),
)
FREE_START = ("cache_features", "feature_cache", "stop_when_lost")
"""What may differ when a run is continued: the number of ranks may too, which is in no config."""


def require_same_run(stored: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to mix two runs in one folder; what does not change the result may differ."""
    theirs = from_dict(TrainConfig, stored)
    free = {
        "out": config.out,
        "loader": replace(theirs.loader, **{name: getattr(config.loader, name) for name in FREE_LOADER}),
        "run": replace(theirs.run, **{name: getattr(config.run, name) for name in FREE_RUN}),
        "start": replace(theirs.start, **{name: getattr(config.start, name) for name in FREE_START}),
    }
    theirs, ours = to_dict(replace(theirs, **free)), to_dict(config)
    changed = sorted(name for name in ours if ours[name] != theirs[name])
    if changed:
        details = "; ".join(f"{name}: {_difference(theirs[name], ours[name])}" for name in changed)
        raise UsageError(
            f"{config.out} holds a run with other settings ({details}); repeat them to continue, or name another out"
        )


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
        return ", ".join(f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in keys)
    return f"{theirs} there, {ours} here"
