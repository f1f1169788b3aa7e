"""Many pictures or texts to features: float32 [N, E], normalised, in the order they were given."""

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych.checkpoint.loaded import Loaded
from diptych.image import Picture, open_picture
from diptych.model.config import Precision
from diptych.model.precision import get_ready
from diptych.model.trie import encode_texts

BATCH_SIZE = 64
"""Pictures at a time."""
TEXT_BATCH_SIZE = 16_384
"""Texts that are tokenized and sorted together; they are computed a few hundred at a time."""


@torch.inference_mode()
def embed_images(loaded: Loaded, pictures: Iterable[Picture], batch_size: int = BATCH_SIZE) -> Float[Tensor, "N E"]:
    """Pictures (paths, bytes, Pillow pictures, arrays [H, W, 3]) to features.

    Raises PictureError for one that cannot be used; sort those out with `diptych.image.open_picture` first.
    """
    model, preprocess, _ = loaded
    features = [torch.empty(0, model.config.embed_dim)]
    remaining = iter(pictures)
    while some := list(islice(remaining, batch_size)):
        pixels = torch.stack([torch.from_numpy(preprocess.pixels(open_picture(picture))) for picture in some])
        image = preprocess.normalize(pixels.to(model.logit_scale.device))
        features.append(model.encode_image(image, normalize=True).float().cpu())
    return torch.cat(features)


@torch.inference_mode()
def embed_texts(
    loaded: Loaded, texts: Sequence[str], batch_size: int = TEXT_BATCH_SIZE, *, precision: Precision = "auto"
) -> Float[Tensor, "N E"]:
    """Texts to features.

    Texts of a batch that begin alike share the work of what they begin with, and no padding is computed (see
    `diptych.model.trie`). Both are exact; `precision="exact"` gives what `encode_text` gives, text by text.
    """
    model, _, tokenizer = loaded
    ready = get_ready(model.text.transformer, precision)
    features = torch.empty(len(texts), model.config.embed_dim)
    for start in range(0, len(texts), batch_size):
        batch = slice(start, start + batch_size)
        features[batch] = F.normalize(encode_texts(model.text, ready, tokenizer(list(texts[batch]))), dim=-1)
    return features
