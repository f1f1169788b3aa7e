"""Many texts to features, and what names the space that they lie in."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych.checkpoint.loaded import Loaded
from diptych.config import to_dict
from diptych.embed.fingerprint import hash_tower, name_space
from diptych.embed.stream import best_streams
from diptych.errors import UsageError
from diptych.model.config import Precision
from diptych.model.inference.precision import choose_text_precision
from diptych.model.inference.text import get_text_encoder

BATCH_SIZE = 16_384
"""Texts that are tokenized and sorted together; they are computed a few hundred at a time."""


@torch.inference_mode()
def embed_texts(
    loaded: Loaded, texts: Sequence[str], batch_size: int = BATCH_SIZE, *, precision: Precision = "exact"
) -> Float[Tensor, "N E"]:
    """Texts to features: float32, normalised, in the order they were given.

    Texts of a batch that begin alike share the work of what they begin with, and no padding is computed (see
    `diptych.model.inference.text`). Both are exact; `precision="exact"` gives what `encode_text` gives, text by text.
    """
    if isinstance(texts, str):
        raise UsageError("texts are a list, of one if there is only one: [text]")
    model, _, tokenizer = loaded
    encode = get_text_encoder(model.text, precision)
    features = torch.empty(len(texts), model.config.embed_dim)
    for start in range(0, len(texts), batch_size):
        batch = slice(start, start + batch_size)
        features[batch] = F.normalize(encode(tokenizer(list(texts[batch]))), dim=-1)
    return features


class TextEncoder:
    """Texts to normalised features, as an `Encoder`. `on_cut` is told how many were longer than the model reads."""

    def __init__(
        self, loaded: Loaded, precision: Precision = "auto", on_cut: Callable[[int], None] | None = None
    ) -> None:
        self.loaded, self.on_cut = loaded, on_cut
        self.precision: Precision = precision
        self.streams = best_streams(loaded.model.logit_scale.device)

    def read(self, text: str, /) -> str:
        """A text is read as it is."""
        return text

    def encode(self, batch: list[str], /) -> Float[Tensor, "N E"]:
        """Features, float32 on the CPU."""
        if self.on_cut is not None and (cut := self.loaded.tokenizer.encode_batch(batch).truncated):
            self.on_cut(cut)
        return embed_texts(self.loaded, batch, precision=self.precision)


def text_space(loaded: Loaded, precision: Precision) -> str:
    """Names the space that text features lie in: equal for equal weights, tokenizer and precision."""
    config = to_dict(loaded.model.config)
    return name_space(
        kind="text",
        weights=hash_tower(loaded.model.text),
        model={key: config[key] for key in ("text", "embed_dim", "activation")},
        tokenizer=loaded.tokenizer.key,
        precision=choose_text_precision(precision, loaded.model.logit_scale.device),
    )
