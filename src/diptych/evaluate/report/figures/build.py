"""The paper's figures, from one results folder: which there are, and the numbers of each.

    FIGURES: number -> function of a Study -> Chart | Missing      draw.py makes pictures of charts

Each shows what there is and says in its caption what is missing. One with too little says why, and which command would
supply it.
"""

from collections.abc import Callable, Mapping

from diptych.evaluate.report.figures import shift, size, transfer
from diptych.evaluate.report.results_table import Study
from diptych.report.charts import Chart, Missing

FIGURES: Mapping[str, Callable[[Study], Chart | Missing]] = {
    "4": transfer.prompting,
    "5": transfer.zero_shot_or_probe,
    "6": transfer.few_shot,
    "7": transfer.data_efficiency,
    "8": transfer.zero_shot_with_probe,
    "9": size.zero_shot_over_size,
    "10": size.probe_over_size,
    "11": transfer.probe_or_baseline,
    "12": shift.task_shift,
    "13": shift.natural_shifts,
    "14": shift.adaptation,
    "15": shift.adaptation_by_shots,
    "17": shift.overlap,
    "20": size.probe_by_dataset,
    "22": size.zero_shot_by_dataset,
}
"""By the paper's number."""


def build_charts(study: Study) -> tuple[list[Chart], list[Missing]]:
    """All figures that can be drawn, and what is missing for the others."""
    built = [figure(study) for figure in FIGURES.values()]
    return [one for one in built if isinstance(one, Chart)], [one for one in built if isinstance(one, Missing)]
