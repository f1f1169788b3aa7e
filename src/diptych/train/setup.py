"""A run before its first step: a model of random weights, a tokenizer."""

import math

import torch

from diptych.errors import NotFoundError, UsageError
from diptych.model.clip import CLIP
from diptych.tokenizer import Tokenizer
from diptych.tokens import BaseTokenizer
from diptych.train.config import TrainConfig
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


def load_tokenizer(config: TrainConfig) -> BaseTokenizer:
    """The tokenizer of the run; it must fit the text tower."""
    text = config.model.text
    if config.tokenizer is not None and not config.tokenizer.is_dir():
        raise NotFoundError(f"no such tokenizer folder: {config.tokenizer}")
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else Tokenizer.clip()
    if tokenizer.vocab_size != text.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the text tower {text.vocab_size}; they must agree"
        )
    if tokenizer.end_token_id != text.vocab_size - 1:
        raise UsageError(
            f"{config.tokenizer} ends a caption with the id {tokenizer.end_token_id}; the text tower finds the end by "
            "the highest id (`diptych tokenizer train` makes one that has it)"
        )
    return tokenizer.with_context_length(text.context_length)
