"""Settings of the stages that look at images."""

from dataclasses import dataclass
from pathlib import Path

from diptych.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """Pairs with pictures -> those whose picture is no copy, was not in an evaluation set, and fits its text."""

    folder: Path
    """Folder of pairs with pictures."""
    out: Path
    """Folder for what stays."""
    per_picture: int = 1
    """Pairs that stay of each picture (the same bytes, or alike to the eye); the first ones."""
    near: bool = True
    """Count pictures that look alike as one, not only the same bytes."""
    max_distance: int = 3
    """Bits of 64 by which the perceptual hashes of pictures that look alike may differ."""
    evaluation: tuple[Path, ...] = ()
    """Folders of shards or of pairs with pictures that are tested on; what looks like one of theirs is dropped."""
    evaluation_distance: int = 3
    """Bits of 64 by which the hash of a picture may differ from one that is tested on, or from its mirror image."""
    known_hashes: tuple[Path, ...] = ()
    """Lists of pictures that must not stay, as `fetch` takes them."""
    known_distance: int = 4
    """Bits by which a picture's perceptual hash may differ from a listed one."""
    min_score: float | None = None
    """Pairs whose picture and text fit less well are dropped: a cosine, as `model` sees it."""
    model: str | None = None
    """What rates them: a run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name."""

    def __post_init__(self) -> None:
        if self.per_picture < 1:
            raise UsageError(f"per_picture {self.per_picture} keeps nothing; use 1 or more")
        for name in ("max_distance", "evaluation_distance", "known_distance"):
            if not 0 <= vars(self)[name] <= 16:
                raise UsageError(f"{name} {vars(self)[name]} is not in 0..16; beyond it different pictures are alike")


@dataclass(frozen=True, kw_only=True)
class ContaminationConfig:
    """How much of an evaluation set is in a training set."""

    data: Path
    """The training set: a folder of shards, tars, tables or images, a tar, or a folder of pairs with pictures."""
    against: Path
    """The evaluation set, likewise."""
    out: Path
    """Folder for overlap.parquet, curve.csv and contamination.json."""
    precision: float = 0.99
    """The threshold is the one that finds most of the copies while this share of what it finds are copies, and no more
    than the rest of the evaluation set would be found by chance in a training set of this size."""
    max_distance: int | None = None
    """Use this threshold (bits of 64) instead of choosing one."""
    samples: int = 500
    """Pictures of the evaluation set that the curve is made from."""
    seed: int = 0
    """Seed of the choice of those pictures, and of how they are changed."""

    def __post_init__(self) -> None:
        if not 0 < self.precision <= 1:
            raise UsageError(f"precision {self.precision} is not a share in (0, 1]; use 0.99")
        if self.max_distance is not None and not 0 <= self.max_distance <= 32:
            raise UsageError(f"max_distance {self.max_distance} is not in 0..32; leave it out to have one chosen")
        if self.samples < 2:
            raise UsageError(f"samples {self.samples} makes no curve; use 500")
