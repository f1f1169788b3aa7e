"""A run before its first step: a model of random weights, a tokenizer."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from diptych.errors import NotFoundError, UsageError
from diptych.model.clip import CLIP
from diptych.model.config import TextConfig, TransformersTextConfig
from diptych.tokenizer import Tokenizer
from diptych.tokens import BaseTokenizer
from diptych.train.config import TrainConfig
from diptych.train.loss import initial_logit_bias

AnyText = TypeVar("AnyText", TextConfig, TransformersTextConfig)


def build_model(config: TrainConfig) -> CLIP:
    """The model before its first step: random weights by the seed; the sigmoid loss begins as its paper says."""
    torch.manual_seed(config.loader.seed)
    model = CLIP(config.model)
    if model.logit_bias is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10))  # Zhai et al. 2023, section 3.2
            model.logit_bias.fill_(initial_logit_bias(config.loader.batch_size))
    return model


def read_tokenizer(folder: Path | None) -> BaseTokenizer:
    """The tokenizer of a folder, or CLIP's."""
    if folder is not None and not folder.is_dir():
        raise NotFoundError(f"no such tokenizer folder: {folder}")
    return Tokenizer.load(folder) if folder else Tokenizer.clip()


def fit_vocabulary(text: AnyText, tokenizer: BaseTokenizer) -> AnyText:
    """The same tower for the ids of a tokenizer. The end token is found by its id where that is not the highest one.

    An encoder of transformers has a vocabulary of its own, and is returned as it is.
    """
    if not isinstance(text, TextConfig):
        return text
    end = tokenizer.end_token_id
    finds = None if text.pool != "end" or end == tokenizer.vocab_size - 1 else end
    return replace(text, vocab_size=tokenizer.vocab_size, end_id=finds, pad_id=tokenizer.pad_token_id)


def load_tokenizer(config: TrainConfig) -> BaseTokenizer:
    """The tokenizer of the run; it must fit the text tower."""
    text, tokenizer = config.model.text, read_tokenizer(config.tokenizer)
    if tokenizer.vocab_size != text.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the text tower {text.vocab_size}; they must agree"
        )
    if fit_vocabulary(text, tokenizer) != text:
        raise UsageError(
            f"{config.tokenizer or 'the tokenizer'} ends a caption with the id {tokenizer.end_token_id} and fills up "
            f"with {tokenizer.pad_token_id}; the text tower reads others (end_id, pad_id)"
        )
    return tokenizer.with_context_length(text.context_length)
