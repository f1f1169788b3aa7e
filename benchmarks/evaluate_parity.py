"""Our numbers beside CLIP_benchmark's on the same folders and features: equal, or the row says by how much not.

    python benchmarks/evaluate_parity.py [--data FOLDER] [--model MODEL]

Four datasets are written in the wds layout: scikit-learn's digits and, from FOLDER (two tars of labelled and captioned
pictures; without it nothing is written down), emoji by class, emoji by several labels, and pictures with several
captions. We compute the features of pictures and prompts; CLIP_benchmark reads the same folders with its own code, is
given those features by place and by text, and says what they are worth. A prompt that we would not have made is an
error there.

Each dataset comes twice: with the pictures' own features, and with features that were made of the texts', with noise (a
model of random weights alone is right by chance, which hides much).
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import PEERS_PYTHON, ROOT, print_table, report, require_peers

BOUND = 1e-6
"""Of a difference: CLIP_benchmark averages recalls and precisions in float32."""
BATCH = 100
NOISE = {"digits": 2.0, "emoji": 0.4, "emoji_several": 0.8, "captions": 0.8}
"""In the features that are made, as a share of the texts' own spread."""
MNIST_TEMPLATE = 'a photo of the number: "{c}".'


# --- the datasets ---


def write_digits(folder: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    samples = []
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):  # type: ignore[attr-defined]
        buffer = io.BytesIO()
        Image.fromarray((pixels * 15.9375).astype(np.uint8)).resize((64, 64)).save(buffer, "PNG")
        samples.append((f"s{i:07d}", "png", buffer.getvalue(), "cls", str(label).encode()))
    write_wds(folder, samples, classnames=[str(i) for i in range(10)], templates=[MNIST_TEMPLATE])


def write_eval(data: Path, root: Path) -> None:
    """What lies in the folder of shared pictures."""
    labelled = list(read_samples(data / "in_style.tar"))
    names = sorted({details["label"] for _, _, details in labelled})
    number = {name: i for i, name in enumerate(names)}
    write_wds(
        root / "emoji",
        [(key, "jpg", picture, "cls", str(number[d["label"]]).encode()) for key, picture, d in labelled],
        classnames=names,
        templates=["a drawing of a {c}.", "an emoji of {c}", "{c}"],
    )
    groups = sorted({details["super"] for *_, details in labelled} | {details["source"] for *_, details in labelled})
    write_wds(
        root / "emoji_several",
        [(key, "jpg", picture, "npy", npy([group in (d["super"], d["source"]) for group in groups]))
         for key, picture, d in labelled],
        kind="multilabel",
        classnames=groups,
        templates=["a drawing of a {c}."],
    )  # fmt: skip
    captioned = list(read_samples(data / "retrieval_fluent3d.tar"))
    count = Counter(text for *_, d in captioned for text in {d["caption"], *d.get("keywords", [])})
    write_wds(
        root / "captions",
        [(key, "jpg", picture, "txt", "\n".join(own_captions(d, count)).encode())
         for key, picture, d in captioned],
        kind="retrieval",
    )  # fmt: skip


def own_captions(details: dict[str, Any], count: Counter[str]) -> list[str]:
    """The caption, and up to two keywords that no other picture has: of captions with equal scores CLIP_benchmark takes
    whichever comes."""
    own = [word for word in details.get("keywords", []) if count[word] == 1 and word != details["caption"]]
    return [details["caption"], *own[:2]]


def read_samples(tar: Path) -> Iterable[tuple[str, bytes, dict[str, Any]]]:
    with tarfile.open(tar) as opened:
        contents = {member.name: opened.extractfile(member).read() for member in opened if member.isfile()}  # type: ignore[union-attr]
    for name in sorted(contents):
        if name.endswith(".jpg"):
            key = name.removesuffix(".jpg")
            yield key, contents[name], json.loads(contents[f"{key}.json"])


def npy(vector: Sequence[bool]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(vector, dtype=np.int64))
    return buffer.getvalue()


def write_wds(
    folder: Path,
    samples: Sequence[tuple[str, str, bytes, str, bytes]],
    *,
    kind: str = "",
    classnames: Sequence[str] = (),
    templates: Sequence[str] = (),
    shards: int = 3,
) -> None:
    (folder / "test").mkdir(parents=True)
    for name, lines in (("classnames", classnames), ("zeroshot_classification_templates", templates)):
        if lines:
            (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    if kind:
        (folder / "dataset_type.txt").write_text(kind)
    (folder / "test" / "nshards.txt").write_text(str(shards))
    size = -(-len(samples) // shards)
    for number in range(shards):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as tar:
            for key, end, picture, suffix, label in samples[number * size : (number + 1) * size]:
                for name, content in ((f"{key}.{end}", picture), (f"{key}.{suffix}", label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


# --- our side ---


def ours(root: Path, source: str | None, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Numbers by `diptych evaluate`'s own functions; features of pictures and texts are left beside the folders."""
    from diptych.checkpoint.layouts import load
    from diptych.embed.cache import FeatureCache
    from diptych.evaluate.config import EvaluateConfig
    from diptych.evaluate.datasets.download import locate
    from diptych.evaluate.datasets.labels import NO_CLASSES, index_labels
    from diptych.evaluate.datasets.layouts import open_samples
    from diptych.evaluate.datasets.registry import load_own
    from diptych.evaluate.models.features import Embedder
    from diptych.evaluate.models.open import clip_image_model
    from diptych.evaluate.protocols.retrieval import retrieve
    from diptych.evaluate.protocols.task import Split, Task
    from diptych.evaluate.protocols.zeroshot import zero_shot

    loaded = load(source) if source else random_model()
    embedder = Embedder(clip_image_model(loaded, "exact"), FeatureCache(root / "cache"), 64)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        kind = {"multilabel": "multi", "retrieval": "captions"}.get(read_kind(root / name), "single")
        toml = root / f"{name}.toml"
        profile = "metric = 'mean_average_precision'" if kind == "multi" else ""
        toml.write_text(f"kind = '{kind}'\n[data]\npath = '{name}'\n[profiles.clip_benchmark]\n{profile}\n")
        entry = load_own(toml)
        used, place = entry.resolve("clip_benchmark"), locate(entry, root)
        assert place is not None
        samples = open_samples(*place, "test", entry.kind)
        numbered = NO_CLASSES if kind == "captions" else index_labels(used, samples, place[0])
        embedded = embedder.embed(samples)
        assert len(embedded.kept) == len(samples)
        texts = prompts_of(samples, numbered)
        vectors = embed(loaded, texts)
        again = Again(texts, vectors)
        for variant, joint in (
            ("pictures", embedded.joint),
            ("made", made(samples, numbered, texts, vectors, NOISE[name])),
        ):
            split = Split(samples=samples, numbered=numbered, embedded=replaced(embedded, joint))
            config = EvaluateConfig(models=("x",), profile="clip_benchmark")
            task = Task(
                config=config, model="x", logit_scale=100.0, embed_texts=again, used=used, splits={"test": split}
            )
            result, _ = retrieve(task) if kind == "captions" else zero_shot(task)
            found[f"{name}, {variant}"] = dict(result.metrics)
            np.save(root / f"{name}.{variant}.npy", joint.numpy())
        np.savez(root / f"{name}.texts.npz", texts=np.array(texts), vectors=vectors.numpy())
    return found


class Again:
    """Features of texts that were computed before: both sides have exactly these."""

    def __init__(self, texts: Sequence[str], vectors: torch.Tensor) -> None:
        self.vectors = dict(zip(texts, vectors, strict=True))

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([self.vectors[text] for text in texts])


def read_kind(folder: Path) -> str:
    path = folder / "dataset_type.txt"
    return path.read_text() if path.exists() else ""


def random_model() -> Any:
    """A ViT of random weights with the released vocabulary: for equality any model will do."""
    from diptych.checkpoint.loaded import Loaded
    from diptych.image import Preprocess
    from diptych.model.clip import CLIP
    from diptych.model.config import CLIPConfig, TextConfig, ViTConfig
    from diptych.tokenizer import Tokenizer

    torch.manual_seed(0)
    vision = ViTConfig(image_size=64, patch_size=16, width=128, layers=4, heads=2)
    text = TextConfig(context_length=77, width=128, layers=4, heads=2)
    model = CLIP(CLIPConfig(embed_dim=64, vision=vision, text=text)).eval()
    return Loaded(model, Preprocess(image_size=64), Tokenizer.clip())


def prompts_of(samples: Any, numbered: Any) -> list[str]:
    """All texts that CLIP_benchmark should ask for."""
    from diptych.templates import fill_template

    if not numbered.names:
        return sorted({caption for captions in samples.labels for caption in captions})
    return sorted({fill_template(t, name) for t in numbered.templates for names in numbered.names for name in names})


def embed(loaded: Any, texts: Sequence[str]) -> torch.Tensor:
    from diptych.embed.texts import embed_texts

    return embed_texts(loaded, texts)


def made(samples: Any, numbered: Any, texts: Sequence[str], vectors: torch.Tensor, amount: float) -> torch.Tensor:
    """Pictures' features near those of one of their texts, with noise that makes a part of them wrong."""
    from diptych.templates import fill_template

    centred = vectors - vectors.mean(dim=0)
    row = {text: i for i, text in enumerate(texts)}
    near = []
    for i in range(len(samples)):
        text = samples.labels[i][0] if not numbered.names else None
        if text is None:
            classes = numbered.numbers[i] or (0,)
            text = fill_template(numbered.templates[0], numbered.names[classes[0]][0])
        near.append(row[text])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(near), vectors.shape[1], generator=generator)
    noise *= amount * centred.norm(dim=1).mean() / noise.norm(dim=1).mean()
    return torch.nn.functional.normalize(centred[near] + noise, dim=-1)


def replaced(embedded: Any, joint: torch.Tensor) -> Any:
    from dataclasses import replace

    return replace(embedded, joint=joint)


# --- CLIP_benchmark's side ---


class Replay:
    """A model that gives features which were computed before: pictures by their place, texts by what they say."""

    def __init__(self, images: np.ndarray, texts: dict[str, np.ndarray]) -> None:
        self.images, self.texts = torch.from_numpy(images), texts

    def encode_image(self, places: torch.Tensor) -> torch.Tensor:
        return self.images[places.long()]

    def encode_text(self, tokens: "Tokens") -> torch.Tensor:
        return torch.from_numpy(np.stack([self.texts[text] for text in tokens.texts]))


class Tokens:
    """Texts that stay texts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def to(self, _device: str) -> "Tokens":
        return self


def peers(root: Path, names: Sequence[str]) -> None:
    from clip_benchmark.datasets.builder import (  # pyright: ignore[reportMissingImports]
        build_dataset,
        image_captions_collate_fn,
    )
    from clip_benchmark.metrics import (  # pyright: ignore[reportMissingImports]
        zeroshot_classification,
        zeroshot_retrieval,
    )

    zeroshot_classification.float = as_float  # NumPy no longer makes arrays of one a number
    found: dict[str, dict[str, float]] = {}
    for name in names:
        kept = np.load(root / f"{name}.texts.npz")
        texts = dict(zip(kept["texts"].tolist(), kept["vectors"], strict=True))
        for variant in ("pictures", "made"):
            model, place = Replay(np.load(root / f"{name}.{variant}.npy"), texts), iter(range(1 << 30))
            retrieval = read_kind(root / name) == "retrieval"
            dataset: Any = build_dataset(
                f"wds/{name}",
                root=str(root / name),
                transform=lambda _, place=place: torch.tensor(next(place)),
                split="test",
                task="zeroshot_retrieval" if retrieval else "zeroshot_classification",
            )
            batched = dataset.batched(BATCH, collation_fn=image_captions_collate_fn if retrieval else collate)
            if retrieval:
                metrics = zeroshot_retrieval.evaluate(
                    model, batched, Tokens, device="cpu", amp=False, recall_k_list=[1, 5, 10]
                )
            else:
                loader = Loader(batched, dataset.classes)
                metrics = zeroshot_classification.evaluate(
                    model, loader, Tokens, dataset.classes, dataset.templates, device="cpu", amp=False
                )
            found[f"{name}, {variant}"] = {key: float(value) for key, value in metrics.items()}
    from importlib.metadata import version

    print(json.dumps({"version": version("clip_benchmark"), "found": found}))


def as_float(value: Any) -> float:
    return value.item() if isinstance(value, np.ndarray) else float(value)


def collate(batch: Sequence[tuple[torch.Tensor, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    places, labels = zip(*batch, strict=True)
    return torch.stack(places), torch.from_numpy(np.stack([np.asarray(label) for label in labels]))


class Loader:
    """Batches, and the set that they come from, as CLIP_benchmark asks for it."""

    def __init__(self, batches: Any, classes: Sequence[str]) -> None:
        self.batches = batches
        self.dataset = type("Classes", (), {"classes": classes})

    def __iter__(self) -> Any:
        return iter(self.batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of in_style.tar and retrieval_fluent3d.tar")
    parser.add_argument("--model", help="a checkpoint; by default random weights")
    options = parser.parse_args()
    require_peers()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_digits(root / "digits")
        names = ["digits"]
        if options.data is not None:
            write_eval(options.data, root)
            names += ["emoji", "emoji_several", "captions"]
        mine = ours(root, options.model, names)
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        command = [PEERS_PYTHON, __file__, "--peers", root, *names]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=quiet)
        theirs = json.loads(done.stdout.strip().splitlines()[-1])
    rows = [row(case, metric, mine[case], value, theirs["version"]) for case, found in theirs["found"].items()
            for metric, value in found.items() if value == value]  # fmt: skip
    if options.data is None:
        print_table(rows)  # the file keeps all four datasets
    else:
        report("evaluate_parity", rows, model=options.model or "random weights", torch=torch.__version__, bound=BOUND)
    bad = [row["case"] for row in rows if not row["difference"] <= BOUND]
    print(f"{len(rows) - len(bad)} of {len(rows)} equal" + (f"; not: {', '.join(bad)}" if bad else ""))
    sys.exit(bool(bad))


def row(case: str, metric: str, mine: dict[str, float], theirs: float, version: str) -> dict[str, Any]:
    value = mine[metric]
    return {
        "case": f"{case}: {metric}",
        "ours": value,
        "peer": theirs,
        "peer_name": f"clip_benchmark {version}",
        "unit": "share",
        "ratio": value / theirs if theirs else float(value == theirs),
        "difference": abs(value - theirs),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peers"]:
        peers(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
