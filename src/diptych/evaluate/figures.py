"""The paper's figures, from one results folder: which there are, and the numbers of each.

    FIGURES: number -> function of a Study -> Chart | Missing      draw.py makes pictures of charts

Each shows what there is and says in its caption what is missing. One with too little says why, and which command would
supply it.
"""

from collections.abc import Callable, Mapping

from diptych.evaluate import figures_shift, figures_size, figures_transfer
from diptych.evaluate.charts import Chart, Missing
from diptych.evaluate.study import Study

FIGURES: Mapping[str, Callable[[Study], Chart | Missing]] = {
    "4": figures_transfer.prompting,
    "5": figures_transfer.zero_shot_or_probe,
    "6": figures_transfer.few_shot,
    "7": figures_transfer.data_efficiency,
    "8": figures_transfer.zero_shot_with_probe,
    "9": figures_size.zero_shot_over_size,
    "10": figures_size.probe_over_size,
    "11": figures_transfer.probe_or_baseline,
    "12": figures_shift.task_shift,
    "13": figures_shift.natural_shifts,
    "14": figures_shift.adaptation,
    "15": figures_shift.adaptation_by_shots,
    "17": figures_shift.overlap,
    "20": figures_size.probe_by_dataset,
    "22": figures_size.zero_shot_by_dataset,
}
"""By the paper's number."""


def build_charts(study: Study) -> tuple[list[Chart], list[Missing]]:
    """All figures that can be drawn, and what is missing for the others."""
    built = [figure(study) for figure in FIGURES.values()]
    return [one for one in built if isinstance(one, Chart)], [one for one in built if isinstance(one, Missing)]
