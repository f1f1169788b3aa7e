"""Sets of pictures with known answers, and what a model makes of them while it is trained.

A set is pictures in class folders, shards with labels or captions, or CLIP Benchmark's WebDataset layout (`.cls` beside
each picture, classnames.txt). It is opened once, before training; its pictures are decoded anew at every evaluation, a
few batches ahead of the model. Ranks share the work in whole batches of fixed content, so that the numbers are those of
one process. A picture that cannot be used is counted and left out.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.checkpoint.loaded import Loaded
from diptych.embed.images import BATCH_SIZE
from diptych.errors import NotFoundError, PictureError, ShardError, UsageError
from diptych.evaluate.metrics.measures import accuracy, mean_per_class_recall, retrieval
from diptych.image import Preprocess, open_picture
from diptych.image_file import IMAGE_SUFFIXES
from diptych.model.clip import CLIP
from diptych.ranks import Ranks, current
from diptych.shards.dataset import load_dataset
from diptych.shards.members import Member, iter_members
from diptych.shards.tombstones import DELETED
from diptych.tokenizer import Tokenizer
from diptych.zeroshot import fill_template

Kind = Literal["zeroshot", "retrieval"]
KINDS: tuple[Kind, ...] = ("zeroshot", "retrieval")
CLASSNAMES = "classnames.txt"
KS = (1, 5, 10)
THREADS = min(8, os.cpu_count() or 1)
_AHEAD = 2 * BATCH_SIZE
"""Decoded pictures that wait for the model."""


@dataclass(frozen=True)
class EvalSample:
    """One picture, and what is known of it."""

    file: Path
    offset: int
    size: int | None
    """Bytes in the file; None: all of it."""
    label: str | None
    captions: tuple[str, ...]

    def read(self) -> bytes:
        with open(self.file, "rb") as handle:
            handle.seek(self.offset)
            return handle.read(-1 if self.size is None else self.size)


@dataclass(frozen=True)
class EvalSet:
    """Pictures of one kind of question."""

    kind: Kind
    questions: tuple[EvalSample, ...]
    classnames: tuple[str, ...]
    skipped: Counter[str]
    """Reason -> samples that were left out on opening."""


def open_set(path: Path, kind: Kind | None = None) -> EvalSet:
    """Open a set; without a kind it is zero-shot if anything carries a label, else retrieval.

    Raises NotFoundError for a path that is not there and UsageError for a set without a usable question.
    """
    if not path.exists():
        raise NotFoundError(f"no such evaluation set: {path} (class folders with pictures, a folder of shards, a .tar)")
    classnames: tuple[str, ...] = ()
    skipped = Counter[str]()
    if path.is_dir() and (path / CLASSNAMES).is_file():
        questions, classnames = _open_wds(path, skipped)
    elif path.is_dir() and not any(path.glob("*.tar")):
        questions = _open_folders(path)
    else:
        questions = _open_shards(path, skipped)
    kind = kind or ("zeroshot" if any(question.label is not None for question in questions) else "retrieval")
    reason = "no_label" if kind == "zeroshot" else "no_caption"
    usable = [q for q in questions if (q.label is not None if kind == "zeroshot" else q.captions)]
    skipped[reason] += len(questions) - len(usable)
    skipped = +skipped
    if not usable:
        raise UsageError(
            f"evaluation set {path} holds nothing to ask ({kind}; left out: {dict(skipped) or 'nothing found'}); "
            "zeroshot needs class folders or samples with a label, retrieval needs captions"
        )
    names = classnames or tuple(sorted({q.label for q in usable if q.label is not None}))
    return EvalSet(kind, tuple(usable), names if kind == "zeroshot" else (), skipped)


def _open_folders(path: Path) -> list[EvalSample]:
    """Every folder in `path` is a class by its name; pictures may lie deeper."""
    return [
        EvalSample(file, 0, None, folder.name.replace("_", " "), ())
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]


def _open_shards(path: Path, skipped: Counter[str]) -> list[EvalSample]:
    """Samples with the `label` of their JSON, and its `captions`, or else the one caption they have."""
    try:
        dataset = load_dataset(path)
    except ShardError as error:
        raise UsageError(f"evaluation set {path} cannot be used: {error}") from None
    skipped.update(reason for *_, reason in dataset.skipped)
    questions = []
    for shard in dataset.shards:
        for row in shard.table.to_pylist():
            if row["key"] in dataset.deleted:
                skipped[DELETED] += 1
                continue
            details = json.loads(row["details"])
            label, several = details.get("label"), details.get("captions")
            if isinstance(label, int):
                raise UsageError(
                    f"samples in {path} carry the number {label} as their label, which says nothing to a model; "
                    f"put names there, or lay {CLASSNAMES} beside .cls files, or ask for retrieval:{path}"
                )
            captions = (
                tuple(c for c in several if isinstance(c, str) and c.strip()) if isinstance(several, list) else ()
            )
            questions.append(
                EvalSample(
                    shard.path,
                    row["offset"],
                    row["size"],
                    label if isinstance(label, str) and label.strip() else None,
                    captions or (row["caption"],),
                )
            )
    return questions


def _open_wds(path: Path, skipped: Counter[str]) -> tuple[list[EvalSample], tuple[str, ...]]:
    """CLIP Benchmark's layout: tars in the folder or its `test`, a class number in each .cls."""
    names = tuple(line.strip() for line in (path / CLASSNAMES).read_text("utf-8").splitlines() if line.strip())
    tars = sorted(path.glob("*.tar")) or sorted((path / "test").glob("*.tar"))
    questions: list[EvalSample] = []
    for tar in tars:
        samples: dict[str, dict[str, Member]] = {}
        for member in iter_members(tar):
            if isinstance(member, Member):
                stem, _, suffix = member.name.rpartition(".")
                samples.setdefault(stem, {})[suffix.lower()] = member
            else:
                skipped[member.reason] += 1
        for members in samples.values():
            picture = next((member for suffix, member in members.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
            if picture is None or "cls" not in members:
                skipped["no_image" if picture is None else "no_label"] += 1
                continue
            label = EvalSample(tar, members["cls"].offset, members["cls"].size, None, ()).read().strip()
            if not label.isdigit() or int(label) >= len(names):
                skipped["bad_label"] += 1
                continue
            questions.append(EvalSample(tar, picture.offset, picture.size, names[int(label)], ()))
    return questions, names


@dataclass
class TrainingEvaluator:
    """Asks a model all questions of one set; an evaluator of training."""

    name: str
    exam: EvalSet
    tokenizer: Tokenizer
    preprocess: Preprocess
    templates: Sequence[str]
    broken: Counter[str] = field(default_factory=Counter)
    """Reason -> pictures of the last evaluation that could not be used, over all ranks."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the numbers that a call returns."""
        if self.exam.kind == "zeroshot":
            found = ["acc1", "acc5", "mean_per_class_recall"]
        else:
            found = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in KS]
        return tuple(f"{self.name}/{metric}" for metric in (*found, "images", "skipped"))

    @torch.inference_mode()
    def __call__(self, model: CLIP) -> dict[str, float]:
        ranks = current()
        loaded = Loaded(model, self.preprocess, self.tokenizer)
        rows, features = self._embed_pictures(loaded, ranks)
        values = self._classify if self.exam.kind == "zeroshot" else self._retrieve
        found = values(loaded, rows, features, ranks) if len(rows) else {}
        found |= {"images": float(len(rows)), "skipped": float(len(self.exam.questions) - len(rows))}
        return {metric: float(found.get(metric.removeprefix(f"{self.name}/"), 0.0)) for metric in self.metrics}

    def _classify(self, loaded: Loaded, rows: list[int], features: Tensor, ranks: Ranks) -> dict[str, float]:
        number = {name: i for i, name in enumerate(self.exam.classnames)}
        labels = [number[self.exam.questions[row].label or ""] for row in rows]
        target = torch.tensor(labels, device=features.device)
        prompts = [fill_template(template, name) for name in self.exam.classnames for template in self.templates]
        texts = embed_shared_texts(loaded, prompts, ranks).unflatten(0, (len(number), len(self.templates)))
        scores = features @ torch.nn.functional.normalize(texts.mean(dim=1), dim=-1).T
        return {
            "acc1": accuracy(scores, target),
            "acc5": accuracy(scores, target, top=5),
            "mean_per_class_recall": mean_per_class_recall(scores, target),
        }

    def _retrieve(self, loaded: Loaded, rows: list[int], features: Tensor, ranks: Ranks) -> dict[str, float]:
        captions = [(i, caption) for i, row in enumerate(rows) for caption in self.exam.questions[row].captions]
        texts = embed_shared_texts(loaded, [caption for _, caption in captions], ranks)
        of_text = torch.tensor([i for i, _ in captions], device=features.device)
        return dict(retrieval(features, texts, KS, image_of_text=of_text, ranks=ranks))

    def _embed_pictures(self, loaded: Loaded, ranks: Ranks) -> tuple[list[int], Float[Tensor, "N E"]]:
        """Which questions have a picture that can be used, in order, and its features: on every rank all of them."""
        device = loaded.model.logit_scale.device
        self.broken.clear()
        rows: list[int] = []
        features = [torch.empty(0, loaded.model.config.embed_dim, device=device)]
        for first, pixels in self._read_batches(ranks):
            image = self.preprocess.normalize(pixels.to(device))
            usable = [i for i in range(BATCH_SIZE) if first + i in self._usable]
            features.append(loaded.model.encode_image(image, normalize=True).float()[usable])
            rows += [first + i for i in usable]
        self.broken = sum((Counter(part) for part in ranks.gather_objects(dict(self.broken))), Counter[str]())
        everyone = ranks.gather(torch.tensor(rows, dtype=torch.int64, device=device))
        order = everyone.argsort()
        return everyone[order].tolist(), ranks.gather(torch.cat(features))[order]

    def _read_batches(self, ranks: Ranks) -> Iterator[tuple[int, Tensor]]:
        """This rank's batches: number of the first question, and BATCH_SIZE pictures, black where there is none."""
        self._usable: set[int] = set()
        count, size = len(self.exam.questions), self.preprocess.image_size
        firsts = [batch * BATCH_SIZE for batch in ranks.shard(-(-count // BATCH_SIZE))]
        mine = iter([row for first in firsts for row in range(first, min(first + BATCH_SIZE, count))])
        waiting: deque[Future[Tensor | str]] = deque()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="diptych-examine") as pool:
            for first in firsts:
                pixels = torch.zeros(BATCH_SIZE, 3, size, size, dtype=torch.uint8)
                for i in range(min(BATCH_SIZE, count - first)):
                    while len(waiting) < _AHEAD and (row := next(mine, None)) is not None:
                        waiting.append(pool.submit(self._read_picture, self.exam.questions[row]))
                    picture = waiting.popleft().result()
                    if isinstance(picture, str):
                        self.broken[picture] += 1
                    else:
                        pixels[i] = picture
                        self._usable.add(first + i)
                yield first, pixels

    def _read_picture(self, question: EvalSample) -> Tensor | str:
        try:
            return torch.from_numpy(self.preprocess.pixels(open_picture(question.read())))
        except PictureError as error:
            return error.reason
        except OSError:  # a file that has gone since the start must not end a run
            return "unreadable"


def embed_shared_texts(loaded: Loaded, texts: Sequence[str], ranks: Ranks) -> Float[Tensor, "N E"]:
    """Features of all texts on every rank, each computed by one; batches are whole, so that shapes recur."""
    device = loaded.model.logit_scale.device
    tokens = loaded.tokenizer(list(texts))
    order = tokens.argmax(dim=-1).argsort(stable=True)
    batches = order.split(BATCH_SIZE)
    features, rows = [torch.empty(0, loaded.model.config.embed_dim, device=device)], [order[:0]]
    for number in ranks.shard(len(batches)):
        batch = batches[number]
        padded = torch.cat([batch, batch[-1:].expand(BATCH_SIZE - len(batch))])
        features.append(loaded.model.encode_text(tokens[padded].to(device), normalize=True).float()[: len(batch)])
        rows.append(batch)
    everyone = ranks.gather(torch.cat(rows).to(device))
    return ranks.gather(torch.cat(features))[everyone.argsort()]
