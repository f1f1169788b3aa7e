"""Small datasets of drawn shapes in the layouts that evaluation reads."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samples import COLOURS, SHAPES, draw, encode, write_tar

NAMES = ("circle", "square", "triangle", "cross")


def pictures(names: Sequence[str] = NAMES, each: int = 6) -> list[tuple[str, int, bytes]]:
    """Key, number of the class, JPEG."""
    return [
        (f"{colour}-{name}", number, encode(draw(colour, name)))
        for colour in COLOURS[:each]
        for number, name in enumerate(names)
    ]


def npy(vector: Sequence[int]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(vector))
    return buffer.getvalue()


def write_wds(
    folder: Path,
    samples: Sequence[tuple[str, bytes, bytes]],
    suffix: str = "cls",
    *,
    split: str = "test",
    classnames: Sequence[str] | None = NAMES,
    templates: Sequence[str] | None = ("a drawing of a {c}.",),
    shards: int = 2,
) -> Path:
    """CLIP_benchmark's layout: (key, label file, picture) in several shards."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    kind = {"txt": "retrieval", "npy": "multilabel"}.get(suffix)
    if kind:
        (folder / "dataset_type.txt").write_text(kind)
    if classnames is not None and suffix != "txt":
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classnames))
    if templates is not None and suffix != "txt":
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{t}\n" for t in templates))
    size = -(-len(samples) // shards)
    for number in range(shards):
        members = []
        for key, label, picture in samples[number * size : (number + 1) * size]:
            members += [(f"{key}.{suffix}", label), (f"{key}.jpg", picture)]
        write_tar(folder / split / f"{number}.tar", members)
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    return folder


def write_shapes(folder: Path, names: Sequence[str] = NAMES, each: int = 6, **options) -> Path:
    """Shapes by class."""
    samples = [(key, str(number).encode(), data) for key, number, data in pictures(names, each)]
    return write_wds(folder, samples, classnames=options.pop("classnames", names), **options)


def write_captions(folder: Path, count: int = 16) -> Path:
    """Two captions a picture, three of the first."""
    samples = []
    for i in range(count):
        colour, shape = COLOURS[i % 8], SHAPES[i // 8]
        lines = [f"a {colour} {shape}", f"{shape} in {colour}"] + ["the first"] * (i == 0)
        samples.append((f"{colour}-{shape}", "\n".join(lines).encode(), encode(draw(colour, shape))))
    return write_wds(folder, samples, "txt")


def write_own(path: Path, text: str = "", data: str = "path = 'shapes'") -> Path:
    """A user's TOML beside its pictures."""
    path.write_text(f"{text}\n[data]\n{data}\n")
    return path
