"""The linear probe, plainly: scikit-learn for every fit, and the paper's search around it."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression


def fit(features, labels, l2, **settings):
    """scikit-learn's fit; a warning that it has not converged is the caller's to judge by `n_iter_`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=1 / l2, **settings).fit(features, labels)


def objective(model, features, labels, l2):
    """Sum of losses plus penalty of a scikit-learn model, in float64."""
    scores = features.astype(np.float64) @ model.coef_.T.astype(np.float64) + model.intercept_
    rows = np.arange(len(labels))
    if scores.shape[1] == 1:
        losses = np.logaddexp(0, np.where(labels == 1, -scores[:, 0], scores[:, 0]))
    else:
        scores = scores - scores[rows, labels][:, None]
        top = scores.max(axis=1, keepdims=True)
        losses = top[:, 0] + np.log(np.exp(scores - top).sum(axis=1))
    return losses.sum() + l2 / 2 * (model.coef_.astype(np.float64) ** 2).sum()


def search(train, train_labels, val, val_labels, test, test_labels, metric, **settings):
    """(strength, value, everything tried): 7 fits two decades apart, then left and right of the best, four times."""
    values = {}

    def value(eighths):
        model = fit(train, train_labels, 10 ** (eighths / 8), **settings)
        values[eighths] = metric(model, val, val_labels)

    for eighths in range(-48, 49, 16):
        value(eighths)
    for distance in (8, 4, 2, 1):
        best = max(values.values())
        peak = max(eighths for eighths in values if values[eighths] == best)
        for eighths in (peak - distance, peak + distance):
            if -48 <= eighths <= 48 and eighths not in values:
                value(eighths)
    best = max(values.values())
    l2 = 10 ** (max(eighths for eighths in values if values[eighths] == best) / 8)
    last = fit(np.concatenate([train, val]), np.concatenate([train_labels, val_labels]), l2, **settings)
    return l2, metric(last, test, test_labels), {10 ** (eighths / 8): found for eighths, found in values.items()}
