"""Protocol `temporal`: zero-shot on frames of videos, PM-0 and PM-10 (Table 16)."""

from diptych.evaluate.protocols.frames import follow_frames, measure_frames
from diptych.evaluate.protocols.task import Arrays, ProtocolSpec, Task
from diptych.evaluate.protocols.zeroshot import POOLED, pooled_scores, zero_shot_scores
from diptych.evaluate.results import Result


def temporal(task: Task) -> tuple[Result, Arrays]:
    """PM-0 and PM-10 of frames of videos."""
    pooled = pooled_scores(task)
    more = {POOLED: follow_frames(task, pooled)["pm0"]} if pooled is not None else {}
    details = {"templates": list(task.test.numbered.templates)}
    return measure_frames(task, "temporal", zero_shot_scores(task), more, details)


SPEC = ProtocolSpec(kinds=("frames",), measure=temporal)
