"""Evaluators that `diptych train` is given: zero-shot accuracy or retrieval on an evaluation set, shared by all ranks.

A set is opened once, before training, by the readers of `diptych evaluate`; damage and samples without a usable label
are counted and left out. Its images are decoded anew at every evaluation, a few batches ahead of the model. Ranks share
the work in whole batches of fixed content, so that the numbers are those of one process.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych import files
from diptych.embed.images import BATCH_SIZE
from diptych.embed.sources import Row, fetch
from diptych.embed.stream import encode_stream
from diptych.errors import DatasetError, NotFoundError, UsageError
from diptych.evaluate.datasets.labels import NO_CLASSES, ClassIndex, index_labels
from diptych.evaluate.datasets.layouts import open_samples
from diptych.evaluate.datasets.registry import OWN, Dataset, DatasetKind, Place, Profile, guess_place
from diptych.evaluate.datasets.samples import Samples
from diptych.evaluate.metrics.measures import accuracy, mean_per_class_recall, retrieval
from diptych.evaluate.models.features import Gathered, gather_features
from diptych.evaluate.results import Protocol
from diptych.image import Preprocess, open_picture
from diptych.model.clip import CLIP
from diptych.ranks import current
from diptych.report.page import Example, pick_rows
from diptych.tokens import BaseTokenizer
from diptych.zeroshot import EmbedTexts, build_classifier

KINDS: dict[Protocol, DatasetKind] = {"zeroshot": "single", "retrieval": "captions"}
"""Protocols of training's evaluations, and the kind of dataset that each needs; the first that fits is the default."""
KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """An evaluation set, opened for one protocol."""

    protocol: Protocol
    samples: Samples
    classes: ClassIndex

    @property
    def classnames(self) -> tuple[str, ...]:
        """The first name of every class, in order."""
        return tuple(names[0] for names in self.classes.names)


def open_set(path: Path, protocol: Protocol | None = None, caption_key: str | None = None) -> EvalSet:
    """Open a set; without a protocol it is zero-shot if anything carries a label, else retrieval. `caption_key` names
    captions in the JSON of shards; all of a picture count.

    Raises NotFoundError for a path that is not there and UsageError for a set that cannot be evaluated.
    """
    if not path.exists():
        raise NotFoundError(f"no such evaluation set: {path} (class folders with pictures, a folder of shards, a .tar)")
    place, problems = guess_place(path), []
    place = place if caption_key is None else replace(place, captions=caption_key)
    for one in (protocol,) if protocol else KINDS:
        try:
            samples = open_samples(place, path, "test", KINDS[one], on_damage="count")
        except (DatasetError, NotFoundError, UsageError) as error:
            problems.append(f"{one}: {error}")
        else:
            return EvalSet(protocol=one, samples=samples, classes=_index_classes(path, samples, one))
    raise UsageError(
        f"evaluation set {path} cannot be used ({'; '.join(problems)}); zeroshot needs class folders or samples with a "
        "label, retrieval needs captions"
    )


def _index_classes(path: Path, samples: Samples, protocol: Protocol) -> ClassIndex:
    if protocol == "retrieval":
        return NO_CLASSES
    entry = Dataset(id=path.name, title=path.name, metric="acc1", profiles={OWN: Profile()})
    try:
        return index_labels(entry.resolve(OWN), samples, Place())
    except DatasetError as error:
        raise UsageError(f"evaluation set {path} cannot be used: {error}; or ask for retrieval:{path}") from None


@dataclass
class TrainingEvaluator:
    """An evaluator of training: one protocol on one set."""

    name: str
    exam: EvalSet
    tokenizer: BaseTokenizer
    preprocess: Preprocess
    templates: Sequence[str]
    broken: Counter[str] = field(default_factory=Counter)
    """Reason -> pictures of the last evaluation that could not be used, over all ranks."""
    answers: Sequence[tuple[int, str, Sequence[tuple[str, float]]]] = ()
    """Zero-shot: some samples of the last evaluation, what they are, and the likeliest labels."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the numbers that a call returns."""
        if self.exam.protocol == "zeroshot":
            found = ["acc1", "acc5", "mean_per_class_recall"]
        else:
            found = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in KS]
        return tuple(f"{self.name}/{metric}" for metric in (*found, "images", "skipped"))

    @property
    def origin(self) -> dict[str, str]:
        """A hash of what is asked, by which a set that changed within a run is found."""
        exam = self.exam
        asked = (exam.protocol, exam.classes.names, exam.samples.keys, exam.samples.labels, tuple(self.templates))
        return {f"evaluation set {self.name}": files.digest(repr(asked))}

    @torch.inference_mode()
    def __call__(self, model: CLIP) -> dict[str, float]:
        samples, device = self.exam.samples, model.logit_scale.device

        def encode_image(pixels: Tensor) -> Tensor:
            return model.encode_image(self.preprocess.normalize(pixels.to(device)), normalize=True)

        images = _encode(model, self._read_image, encode_image, samples.rows.read, len(samples))
        self.broken = images.skipped
        measure = partial(self._classify, model) if self.exam.protocol == "zeroshot" else self._retrieve
        found = measure(images, partial(embed_shared_texts, model, self.tokenizer)) if images.kept else {}
        found |= {"images": float(len(images.kept)), "skipped": float(len(samples) - len(images.kept))}
        return {metric: float(found.get(metric.removeprefix(f"{self.name}/"), 0.0)) for metric in self.metrics}

    def _read_image(self, row: Row) -> Tensor:
        return torch.from_numpy(self.preprocess.pixels(open_picture(cast(bytes, fetch(row)))))

    @property
    def examples(self) -> list[Example]:
        """Right and wrong answers of the last evaluation, with their pictures."""
        rows = sorted(row for row, *_ in self.answers)  # tables are read in rising order
        pictures = dict(zip(rows, map(fetch, self.exam.samples.rows.read(rows)), strict=True))
        return [
            Example(picture=cast(bytes, pictures[row]), label=label, answers=answers)
            for row, label, answers in self.answers
        ]

    def _classify(self, model: CLIP, images: Gathered, embed: EmbedTexts) -> dict[str, float]:
        numbers = self.exam.classes.numbers
        labels = torch.tensor([numbers[i][0] for i in images.kept], device=images.features.device)
        scores = images.features @ build_classifier(embed, self.exam.classes.names, self.templates)
        self._keep_answers(scores * model.logit_scale.exp(), labels, images.kept)
        return {
            "acc1": accuracy(scores, labels),
            "acc5": accuracy(scores, labels, top=5),
            "mean_per_class_recall": mean_per_class_recall(scores, labels),
        }

    def _keep_answers(self, logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"], kept: Sequence[int]) -> None:
        rows = pick_rows((logits.argmax(dim=-1) == labels).cpu().numpy())
        names = self.exam.classnames
        top = logits[rows].softmax(dim=-1).topk(min(5, len(names)))
        self.answers = [
            (kept[row], names[int(labels[row])], [(names[i], p) for i, p in zip(ids, shares, strict=True)])
            for row, ids, shares in zip(rows, top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _retrieve(self, images: Gathered, embed: EmbedTexts) -> dict[str, float]:
        captions = [cast(tuple[str, ...], self.exam.samples.labels[i]) for i in images.kept]
        texts = embed([caption for several in captions for caption in several])
        of_text = torch.tensor([i for i, several in enumerate(captions) for _ in several], device=texts.device)
        return dict(retrieval(images.features, texts, KS, image_of_text=of_text, ranks=current()))


def embed_shared_texts(model: CLIP, tokenizer: BaseTokenizer, texts: Sequence[str]) -> Float[Tensor, "N E"]:
    """Features of all texts on every rank, each computed by one; texts of a length are computed together."""
    tokens, device = tokenizer(list(texts)), model.logit_scale.device
    order = tokens.argmax(dim=-1).argsort(stable=True)

    def encode_text(batch: Tensor) -> Tensor:
        return model.encode_text(batch.to(device), normalize=True)

    gathered = _encode(model, lambda row: row, encode_text, lambda wanted: tokens[order[wanted]], len(texts))
    return gathered.features[order.argsort().to(device)]


def _encode(
    model: CLIP,
    read: Callable[[Any], Tensor],
    tower: Callable[[Tensor], Tensor],
    fetch_items: Callable[[list[int]], Iterable[Any]],
    count: int,
) -> Gathered:
    """Features of `count` inputs on every rank, in their order, each batch computed by one rank."""
    ranks = current()
    batches = ranks.shard(math.ceil(count / BATCH_SIZE))
    mine = [i for batch in batches for i in range(batch * BATCH_SIZE, min(count, (batch + 1) * BATCH_SIZE))]
    items = zip(mine, fetch_items(mine), strict=True)
    encoder = _WholeBatches(read, tower)
    with closing(encode_stream(encoder, items, batch_size=BATCH_SIZE, group=lambda i: i // BATCH_SIZE)) as outcomes:
        return gather_features(ranks, dict(outcomes), model.config.embed_dim, model.logit_scale.device)


@dataclass(frozen=True)
class _WholeBatches:
    """A tower in training as an `Encoder`: every batch is filled up to BATCH_SIZE, so that compiled shapes recur."""

    read: Callable[[Any], Tensor]
    tower: Callable[[Tensor], Tensor]
    streams: int = 1
    threads: int = field(default_factory=torch.get_num_threads)

    @torch.inference_mode()
    def encode(self, batch: list[Tensor]) -> Float[Tensor, "N E"]:
        torch.set_num_threads(self.threads)  # threads that begin after the reading ones would have one core
        rows = torch.stack([*batch, *batch[-1:] * (BATCH_SIZE - len(batch))])
        return self.tower(rows)[: len(batch)].float().cpu()
