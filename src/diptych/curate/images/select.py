"""Pairs with pictures -> those whose picture is no copy, is not tested on, is not listed, and fits its text.

    out/evaluation-0/ hashes of the pictures that are tested on; a stage
    out/facts/        what each picture is: SHA-256, perceptual hash, whether it is listed, its score; a stage
    out/decided/      the reason of each row, decided over all rows together
    out/...           the rows that stay; a stage

Reasons: `known_hash`, `score`, `evaluation` (looks like a picture that is tested on), `duplicate` (the bytes of an
earlier picture), `near_duplicate` (looks like one, colour included). They are looked at in this order, rows in the
order of the parts. A dropped row does not use up its picture's `per_picture`.
"""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diptych import files
from diptych.curate.images.blocklist import KnownHashes, read_known
from diptych.curate.images.config import PicturesConfig
from diptych.curate.images.contamination import hash_set, picture_files, read_hashes
from diptych.curate.images.phash import Hashes, find_near, first_alike, perceptual_hashes
from diptych.curate.images.prepare import HASHED_SIDE, decode_small, on_white, to_hash
from diptych.curate.rows import with_reason
from diptych.errors import PictureError, UsageError
from diptych.stage.folder import read_manifest, read_part, read_rows
from diptych.stage.job import Task
from diptych.stage.run import Engine, StageReport, tasks_of

Score = Callable[[Sequence[bytes], Sequence[str]], Sequence[float]]
"""Encoded pictures and their texts -> how well they fit, for example CLIP's cosines; picklable."""

FACTS = pa.schema(
    [
        pa.field("sha256", pa.string()),
        pa.field("phash", pa.uint64()),
        pa.field("colour", pa.uint32()),
        pa.field("known", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("broken", pa.string()),
    ]
)
COLOUR_TOLERANCE = 12
"""Levels of 256 by which the mean red, green and blue of copies may differ."""
_ROWS = 256


def run(config: PicturesConfig, *, engine: Engine, score: Score | None = None) -> StageReport:
    """Decide and write; `score` is needed for `min_score`."""
    if (score is None) != (config.min_score is None):
        raise UsageError(
            f"min_score {config.min_score} and a scoring function belong together; give both --min-score and --model, "
            "or neither"
        )
    tasks, parent = tasks_of(config.folder), read_manifest(config.folder).hash
    known = read_known(config.known_hashes, config.known_distance)
    facts = config.out / "facts"
    settings = {"known_hashes": config.known_hashes, "known_distance": config.known_distance}
    engine.run_stage(
        Facts(known=known, score=score),
        tasks,
        facts,
        settings | {"scored": score is not None, "model": config.model},
        schema=FACTS,
        parent=parent,
    )
    decided = config.out / "decided"
    _decide(config, tasks, facts, decided, _evaluation_hashes(config, engine))
    by_path = [Task(task.name, (*task.inputs, decided / f"{task.name}.parquet"), rows=False) for task in tasks]
    schema = pq.read_schema(tasks[0].inputs[0]).remove_metadata()
    return engine.run_stage(Apply(), by_path, config.out, _settings(config), schema=schema, parent=parent)


def _settings(config: PicturesConfig) -> dict[str, object]:
    """What decides the outcome; folders are named by their hash, since their pictures were read already."""
    return vars(config) | {"folder": None, "out": None, "evaluation": [picture_files(p)[1] for p in config.evaluation]}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A stage: rows with pictures -> what each picture is."""

    known: KnownHashes
    score: Score | None

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                yield self._look(batch.slice(start, _ROWS))

    def _look(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        images, captions = batch.column("image").to_pylist(), batch.column("caption").to_pylist()
        rows = [self._facts(image) for image in images]
        if self.score is not None:
            whole = [i for i, row in enumerate(rows) if row["broken"] is None]
            scores = self.score([images[i] for i in whole], [captions[i] for i in whole]) if whole else []
            for i, value in zip(whole, scores, strict=True):
                rows[i]["score"] = float(value)
        return with_reason(pa.RecordBatch.from_pylist(rows, schema=FACTS), [None] * len(rows))

    def _facts(self, image: bytes | None) -> dict[str, Any]:
        if not image:
            return dict.fromkeys(FACTS.names) | {"broken": "empty"}
        try:
            picture = on_white(decode_small(image, 2 * HASHED_SIDE))
        except PictureError as error:
            return dict.fromkeys(FACTS.names) | {"broken": error.reason}
        red, green, blue = picture.resize((1, 1), Image.Resampling.BOX).tobytes()
        return {
            "sha256": hashlib.sha256(image).hexdigest(),
            "phash": int(perceptual_hashes([to_hash(picture)])[0]),
            "colour": red << 16 | green << 8 | blue,
            "known": self.known(image),
            "score": None,
            "broken": None,
        }


@dataclass(frozen=True)
class Apply:
    """A stage: (path of a part, path of its reasons) -> the rows with their reasons."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            part, decided = batch.column("path").to_pylist()
            reasons = pq.read_table(decided).column("reason").to_pylist()
            place = 0
            for rows in read_part(Path(part)):
                yield with_reason(rows, reasons[place : place + rows.num_rows])
                place += rows.num_rows


def _decide(config: PicturesConfig, tasks: Sequence[Task], facts: Path, decided: Path, evaluation: Hashes) -> None:
    table = pa.Table.from_batches(read_rows(facts), schema=FACTS)
    reasons = decide(table, config, evaluation)
    decided.mkdir(exist_ok=True)
    place = 0
    for task in tasks:
        rows = pq.read_metadata(facts / f"{task.name}.parquet").num_rows
        part = pa.table({"reason": pa.array(reasons[place : place + rows], pa.string())})
        buffer = io.BytesIO()
        pq.write_table(part, buffer, compression="zstd")
        path = decided / f"{task.name}.parquet"
        if not path.exists() or path.read_bytes() != buffer.getvalue():
            (config.out / "done" / f"{task.name}.json").unlink(missing_ok=True)
            files.write_bytes(path, buffer.getvalue())
        place += rows


def decide(facts: pa.Table, config: PicturesConfig, evaluation: Hashes) -> list[str | None]:
    """The reason of each row, None for those that stay."""
    reasons: list[str | None] = facts.column("broken").to_pylist()
    hashes = facts.column("phash").combine_chunks().fill_null(0).to_numpy()
    tested = np.zeros(len(hashes), bool)
    tested[find_near(hashes, evaluation, config.evaluation_distance)[0]] = True
    digests, known, scores = (facts.column(name).to_pylist() for name in ("sha256", "known", "score"))
    for i, reason in enumerate(reasons):
        if reason is not None:
            continue
        if known[i] is not None:
            reasons[i] = "known_hash"
        elif config.min_score is not None and not scores[i] >= config.min_score:
            reasons[i] = "score"
        elif tested[i]:
            reasons[i] = "evaluation"
    left = np.flatnonzero([reason is None for reason in reasons])
    alike = left[first_alike(hashes[left], config.max_distance)].tolist() if config.near and len(left) else []
    same, seen = Counter[str](), defaultdict[int, list[int]](list)
    colours = facts.column("colour").to_pylist()
    for place, i in enumerate(left.tolist()):
        kind = seen[alike[place]] if alike else []
        if same[digests[i]] >= config.per_picture:
            reasons[i] = "duplicate"
        elif sum(_same_colour(colours[i], colour) for colour in kind) >= config.per_picture:
            reasons[i] = "near_duplicate"
        else:
            same[digests[i]] += 1
            kind.append(colours[i])
    return reasons


def _same_colour(one: int, other: int) -> bool:
    """Whether two mean colours are near; the hash sees no colour, and a red ring is no copy of a blue one."""
    return all(abs((one >> shift & 255) - (other >> shift & 255)) <= COLOUR_TOLERANCE for shift in (0, 8, 16))


def _evaluation_hashes(config: PicturesConfig, engine: Engine) -> Hashes:
    """Hashes of the evaluation pictures, and of their mirror images."""
    found = [np.empty(0, np.uint64)]
    for number, folder in enumerate(config.evaluation):
        out = config.out / f"evaluation-{number}"
        hash_set(folder, out, engine)
        found.append(read_hashes(out)[1][:, :2].ravel())
    return np.unique(np.concatenate(found))
