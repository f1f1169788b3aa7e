"""The losses in numpy, float64, dense, with their gradients worked out by hand: the paper's Figure 3 and SigLIP's."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def clip_loss(image_features, text_features, t, groups=None):
    """Loss, and its derivatives by both features and by t, the logarithm of the scale.

    Pairs with equal `groups` are right answers for each other, to equal parts.
    """
    n = len(image_features)
    groups = np.arange(n) if groups is None else np.asarray(groups)
    right = (groups[:, None] == groups[None, :]).astype(np.float64)
    right /= right.sum(axis=1, keepdims=True)
    logits = image_features @ text_features.T * np.exp(t)  # scaled pairwise cosine similarities [n, n]
    p_image, p_text = softmax(logits), softmax(logits.T)
    loss_image = -(right * np.log(p_image)).sum(axis=1).mean()
    loss_text = -(right * np.log(p_text)).sum(axis=1).mean()
    d_logits = ((p_image - right) + (p_text - right).T) / (2 * n)
    d_image = d_logits @ text_features * np.exp(t)
    d_text = d_logits.T @ image_features * np.exp(t)
    return (loss_image + loss_text) / 2, d_image, d_text, (d_logits * logits).sum()


def siglip_loss(image_features, text_features, t, bias, groups=None):
    """Loss, and its derivatives by both features, by t and by the bias."""
    n = len(image_features)
    groups = np.arange(n) if groups is None else np.asarray(groups)
    sign = np.where(groups[:, None] == groups[None, :], 1.0, -1.0)
    similarities = image_features @ text_features.T * np.exp(t)
    loss = np.logaddexp(0, -sign * (similarities + bias)).sum() / n
    d_logits = -sign / (1 + np.exp(sign * (similarities + bias))) / n
    d_image, d_text = d_logits @ text_features * np.exp(t), d_logits.T @ image_features * np.exp(t)
    return loss, d_image, d_text, (d_logits * similarities).sum(), d_logits.sum()
