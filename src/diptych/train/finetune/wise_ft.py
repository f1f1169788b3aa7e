"""Between two models: weights on the straight line from one to the other (WiSE-FT, Wortsman et al. 2022).

A fine-tuned model is better at what it was tuned for and worse at the rest; models on the line often keep most of both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.checkpoint.loaded import Loaded
from diptych.errors import UsageError
from diptych.model.clip import CLIP
from diptych.train.finetune.guard import COUNTS, HEADLINES

ALPHAS = tuple(step / 10 for step in range(11))
"""0 is the start, 1 the fine-tuned model."""
RULE = (
    "the highest mean over evaluations, of acc1 where there is one, else of the mean of both recalls at 1, else of all "
    "its shares; of equal ones the alpha nearest to 0"
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model on the line, and how good it is."""

    alpha: float
    score: float
    """The number that the choice is made by, 0..1 (RULE)."""
    metrics: dict[str, float]


def interpolate(start: CLIP, tuned: CLIP, alpha: float) -> CLIP:
    """The model of weights (1 - alpha) * start + alpha * tuned; at 0 and 1 the two themselves, bit for bit."""
    ours, theirs = start.state_dict(), tuned.state_dict()
    with torch.device("meta"):
        model = CLIP(start.config)
    model.load_state_dict({name: _between(ours[name], theirs[name], alpha) for name in ours}, assign=True)
    return model.eval()


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if alpha in (0, 1) or not a.is_floating_point():  # a counter of batches has no middle
        return (a if alpha < 0.5 else b).clone()
    return (1 - alpha) * a + alpha * b


def require_same_kind(start: Loaded, tuned: Loaded) -> None:
    """Refuse two models that are not on one line."""
    pairs = {
        "sizes": (start.model.config, tuned.model.config),
        "tokenizers": (start.tokenizer, tuned.tokenizer),
        "preprocessing": (start.preprocess, tuned.preprocess),
    }
    other = [name for name, (a, b) in pairs.items() if a != b]
    if other:
        raise UsageError(
            f"the two models have other {' and '.join(other)}; name a model and what was fine-tuned from it"
        )


def sweep(
    start: CLIP,
    tuned: CLIP,
    evaluators: Sequence[Callable[[CLIP], Mapping[str, float]]],
    alphas: Sequence[float] = ALPHAS,
    on_point: Callable[[Point], None] = lambda _: None,
) -> list[Point]:
    """Ask every evaluator about every model."""
    points = []
    for alpha in alphas:
        model = interpolate(start, tuned, alpha)
        with torch.inference_mode():
            metrics = {name: value for evaluator in evaluators for name, value in evaluator(model).items()}
        points.append(Point(alpha=alpha, score=score(metrics), metrics=metrics))
        on_point(points[-1])
    return points


def score(metrics: Mapping[str, float]) -> float:
    """One number for all evaluations, each of which counts once (RULE)."""
    names: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        evaluation, _, metric = name.rpartition("/")
        if metric not in COUNTS:
            names.setdefault(evaluation, {})[metric] = value
    scores = []
    for found in names.values():
        headlines = [value for name, value in found.items() if name in HEADLINES] or list(found.values())
        scores.append(sum(headlines) / len(headlines))
    return sum(scores) / len(scores) if scores else 0.0


def choose(points: Sequence[Point]) -> Point:
    """The best point by RULE."""
    return max(points, key=lambda point: (point.score, -point.alpha))
