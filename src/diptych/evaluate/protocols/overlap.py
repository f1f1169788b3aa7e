"""Protocol `overlap`: accuracy with and without the images that were seen in training (section 5)."""

import pyarrow as pa
import pyarrow.parquet as pq

from diptych import files
from diptych.errors import NotFoundError, UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.metrics import measures, overlap
from diptych.evaluate.metrics.classification import check_scores
from diptych.evaluate.metrics.measures import wilson_interval
from diptych.evaluate.protocols.task import Arrays, ProtocolSpec, Task
from diptych.evaluate.protocols.zeroshot import zero_shot_scores
from diptych.evaluate.results import Result


def divide(task: Task) -> tuple[Result, Arrays]:
    """Section 5: accuracy with and without the pictures that were seen in training."""
    scores, labels = zero_shot_scores(task), task.test.labels(task.used.dataset.kind)
    check_scores(scores, task.used.dataset.id)
    overlapping = read_overlap(task.config)
    right = measures.is_among(scores, labels, 1).tolist()
    present = set(task.test.samples.keys)
    if unknown := sorted(set(overlapping) - present):
        raise UsageError(
            f"{len(unknown)} keys of the overlap are not in {task.used.dataset.id} ({unknown[0]}, ...); take the "
            "overlap of the set that is evaluated"
        )
    answers = dict(zip(task.test.keys, right, strict=True))
    found = overlap.measure_overlap(answers, [key for key in overlapping if key in answers])
    details = {name: value for name, value in vars(found).items() if name != "interval"}
    details["interval"] = list(found.interval)
    result = task.result(
        "overlap",
        "acc1",
        found.acc_all,
        ci95=wilson_interval(found.acc_all, found.images),
        chance=measures.chance("acc1", len(task.test.numbered.names)),
        metrics={"acc1": found.acc_all, "acc_clean": found.acc_clean, "acc_overlap": found.acc_overlap},
        details=details,
    )
    return result, {}


def read_overlap(config: EvaluateConfig) -> list[str]:
    """The keys of the images that were seen in training."""
    path = config.overlap
    assert path is not None, "EvaluateConfig asks for it"
    if not path.is_file():
        raise NotFoundError(f"no such file: {path} (overlap.parquet of `diptych curate contamination`)")
    try:
        return sorted(pq.read_table(path, columns=["key"]).column("key").to_pylist())
    except (ValueError, KeyError, pa.ArrowException) as error:
        raise UsageError(
            f"{path} is no overlap.parquet with a column of keys ({str(error).splitlines()[0]}); give the one that "
            "`diptych curate contamination` wrote"
        ) from None


SPEC = ProtocolSpec(
    kinds=("single",),
    measure=divide,
    settings=lambda config, *_: {"overlap": files.digest(repr(read_overlap(config)))},
)
