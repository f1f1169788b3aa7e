"""The paper's Figure 3 in numpy, float64, with its gradients worked out by hand."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def clip_loss(image_features, text_features, t):
    """Loss, and its derivatives by both features and by t, the logarithm of the scale."""
    n = len(image_features)
    logits = image_features @ text_features.T * np.exp(t)  # scaled pairwise cosine similarities [n, n]
    labels = np.arange(n)
    p_image, p_text = softmax(logits), softmax(logits.T)
    loss_image = -np.log(p_image[labels, labels]).mean()
    loss_text = -np.log(p_text[labels, labels]).mean()
    d_logits = ((p_image - np.eye(n)) + (p_text - np.eye(n)).T) / (2 * n)
    d_image = d_logits @ text_features * np.exp(t)
    d_text = d_logits.T @ image_features * np.exp(t)
    return (loss_image + loss_text) / 2, d_image, d_text, (d_logits * logits).sum()
