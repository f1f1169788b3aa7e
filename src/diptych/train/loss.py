"""What training minimises (paper section 2.3, the lower half of Figure 3)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def clip_loss(
    image_features: Float[Tensor, "N E"],
    text_features: Float[Tensor, "N E"],
    logit_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy over the similarities of N pairs: each image picks its text, each text its image.

    Features are normalised, `logit_scale` is exp(t). Computed in float32 whatever the features are.
    """
    logits_per_image = logit_scale * image_features.float() @ text_features.float().T  # [N, N]
    labels = torch.arange(len(image_features), device=image_features.device)  # the diagonal
    loss_per_image = F.cross_entropy(logits_per_image, labels)
    loss_per_text = F.cross_entropy(logits_per_image.T, labels)
    return (loss_per_image + loss_per_text) / 2
