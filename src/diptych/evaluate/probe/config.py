"""Settings of the linear probe and of few-shot classification."""

from dataclasses import dataclass

from diptych.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How the strength of the penalty is found."""

    l2: float | None = None
    """Strength of the penalty; None: search for it, as the paper does. scikit-learn's C is 1 / l2."""
    val_share: float = 0.2
    """Share of each class' training pictures that the search is validated on, if the set has no validation split."""

    def __post_init__(self) -> None:
        check_strength(self.l2)
        if not 0 < self.val_share < 1:
            raise UsageError(f"val_share {self.val_share} is not between 0 and 1; 0.2 holds out a fifth")


def check_strength(l2: float | None) -> None:
    """UsageError unless it is None or a positive number."""
    if l2 is not None and not 0 < l2 < float("inf"):
        raise UsageError(
            f"l2 {l2} is not a strength; without a penalty there may be no optimum: give a positive number, say 0.316"
        )


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """How classifiers are trained on a few pictures a class."""

    l2: float | None = None
    """Strength of the penalty. The paper does not say which, and one picture a class leaves none to choose it on; None:
    a thousandth of the training features' mean squared distance from their mean, so that their scale does not count."""

    def __post_init__(self) -> None:
        check_strength(self.l2)
