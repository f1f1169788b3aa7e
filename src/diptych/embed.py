"""Many pictures or texts to features: float32 [N, E], normalised, in the order they were given."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.checkpoint.loaded import Loaded
from diptych.features.config import Precision
from diptych.features.towers import ImageTower, encode_pictures
from diptych.image import Picture

BATCH_SIZE = 64
"""Pictures or texts at a time."""


def embed_images(
    loaded: Loaded, pictures: Iterable[Picture], batch_size: int = BATCH_SIZE, *, precision: Precision = "exact"
) -> Float[Tensor, "N E"]:
    """Pictures (paths, bytes, Pillow pictures, arrays [H, W, 3]) to features; they are decoded while others compute.

    `precision` as in `diptych.features.config`: "auto" is several times as fast where bfloat16 is. Raises PictureError
    for one that cannot be used; sort those out with `diptych.image.open_picture` first.
    """
    tower = ImageTower(loaded, precision)
    return torch.cat([torch.empty(0, tower.embed_dim), *encode_pictures(tower, pictures, batch_size)])


@torch.inference_mode()
def embed_texts(loaded: Loaded, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> Float[Tensor, "N E"]:
    """Texts to features.

    Texts of like length are computed together, since a batch is as long as its longest one.
    """
    model, _, tokenizer = loaded
    tokens = tokenizer(list(texts))  # [N, L]
    order = tokens.argmax(dim=-1).argsort(stable=True)  # by the place of the end token
    features = torch.empty(len(tokens), model.config.embed_dim)
    for rows in order.split(batch_size):
        text = tokens[rows].to(model.logit_scale.device)
        features[rows] = model.encode_text(text, normalize=True).float().cpu()
    return features
