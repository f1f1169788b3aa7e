"""`diptych finetune` and `diptych wise-ft`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from diptych.cli.output import print_on_first_rank, printable
from diptych.cli.training import (
    build_evaluators,
    choose_templates,
    describe_evaluator,
    open_evaluators,
    run_and_report,
    write_page,
)
from diptych.errors import UsageError
from diptych.model.config import Activation
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.train.config import (
    LossConfig,
    OptimConfig,
    RunConfig,
    StartConfig,
    TrainConfig,
)
from diptych.train.recipe import FINETUNE

if TYPE_CHECKING:
    from diptych.report.page import Example
    from diptych.train.finetune.wise_ft import Point

RISKY_LR = 1e-4
"""From here on a rate is one for training from scratch: the paper's begin at 3.6e-4 (Table 20)."""


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train a model further on other pairs, with safe defaults, or continue the unfinished run in --out.

    Says after each epoch what each evaluation won or lost beside the model it started from.

    Example: diptych finetune ViT-B-32/openai --data shards/ --out runs/tuned --evaluate pets=pets/
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai)."""
    data: tuple[str, ...]
    """Folders of shards, tars, or ranges of them, here or at a URL; PATH@0.5 sees half of it in an epoch, PATH@2 all
    of it twice."""
    out: Path
    """The run's folder: checkpoints, logs, config; with LoRA also adapter/, which peft reads."""
    evaluate: tuple[str, ...] = ()
    """NAME=PATH of sets to be asked about before, during and after: class folders of pictures, shards with labels
    (zero-shot accuracy) or with captions (retrieval). NAME=zeroshot:PATH or NAME=retrieval:PATH chooses."""
    templates: tuple[str, ...] | None = None
    """For zero-shot sets: names of template lists (simple: a photo of a {}; none: the bare name; imagenet_80,
    imagenet_7), or templates with a {}. By default those that the checkpoint names, else simple."""
    start: StartConfig = field(default_factory=StartConfig)
    loader: LoaderConfig = FINETUNE.loader
    loss: LossConfig = FINETUNE.loss
    optim: OptimConfig = FINETUNE.optim
    run: RunConfig = FINETUNE.run

    def __call__(self) -> int:
        self._refuse_early()
        from diptych.train.finetune.start import open_start

        opened = open_start(self.out, self.model, self.start)
        config = TrainConfig(
            model=opened.config,
            data=tuple(SourceConfig.parse(text) for text in self.data),
            out=self.out,
            loader=self.loader,
            loss=self.loss,
            optim=self.optim,
            run=self.run,
            start_model=self.model,
            start=self.start,
        )
        preprocess, tokenizer = opened.preprocess, opened.tokenizer
        templates = choose_templates(self.templates, opened.config)
        evaluators = open_evaluators(self.evaluate, lambda: tokenizer, preprocess, templates, config)
        return run_and_report(config, evaluators)

    def _refuse_early(self) -> None:
        """Before anything is read: what cannot be done, and what is likely a slip."""
        if self.start.stop_when_lost is not None and not self.evaluate:
            raise UsageError("stop_when_lost needs something to be lost; add --evaluate NAME=PATH")
        if self.start.lora_rank is not None:
            from diptych.train.finetune.lora import require_peft

            require_peft()
        if self.optim.lr >= RISKY_LR and self.start.lora_rank is None:
            print_on_first_rank(
                f"warning: a learning rate of {self.optim.lr:g} is one for training from scratch; it is likely to undo "
                f"what the model knows (the default is {FINETUNE.optim.lr:g})"
            )


@dataclass(frozen=True, kw_only=True)
class WiseFT:
    """Interpolate between a pre-trained and a fine-tuned model (WiSE-FT) and save the best one.

    Weights are (1 - alpha) * start + alpha * fine-tuned, for alpha 0, 0.1, ..., 1. The best is the one with the highest
    mean over evaluations (acc1, or else the mean of both recalls at 1); of equal ones the nearest to the start.

    Example: diptych wise-ft ViT-B-32/openai runs/tuned --evaluate pets=pets/ --out between
    """

    start: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="START")]
    """The model before fine-tuning: a run's folder, a checkpoint of any layout, or a published name."""
    finetuned: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FINETUNED")]
    """The model after it."""
    evaluate: tuple[str, ...]
    """NAME=PATH of sets to be asked about, as in `diptych finetune`."""
    out: Path
    """New folder: wise_ft.json, the whole curve; model/, the best model; report.html, to look at."""
    templates: tuple[str, ...] | None = None
    """For zero-shot sets, as in `diptych finetune`."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    device: str = "cpu"
    """`cpu`, `cuda`, ..."""

    def __call__(self) -> int:
        if self.out.exists() and any(self.out.iterdir()):
            raise UsageError(f"{self.out} is not empty; name a new folder")
        from diptych import files
        from diptych.checkpoint import layouts
        from diptych.model.device import choose_device
        from diptych.train.finetune import guard, wise_ft

        device = choose_device(self.device)
        models = [layouts.load(m, device=device, activation=self.activation) for m in (self.start, self.finetuned)]
        start, tuned = models
        wise_ft.require_same_kind(start, tuned)
        templates = choose_templates(self.templates, start.model.config)
        evaluators = build_evaluators(self.evaluate, start.tokenizer, start.preprocess, templates)
        for evaluator in evaluators:
            print(describe_evaluator(evaluator))
        names = [name for evaluator in evaluators for name in evaluator.metrics if name.endswith(guard.HEADLINES)]
        print("alpha  score   " + "  ".join(names))
        shown: dict[float, dict[str, list[Example]]] = {}

        def keep(point: "Point") -> None:
            _print_point(point, names)
            shown[point.alpha] = {evaluator.name: evaluator.examples for evaluator in evaluators}

        points = wise_ft.sweep(start.model, tuned.model, evaluators, on_point=keep)
        best = wise_ft.choose(points)
        files.make_folder(self.out)
        loaded = start._replace(model=wise_ft.interpolate(start.model, tuned.model, best.alpha))
        layouts.save(loaded, self.out / "model")
        files.write_json(self.out / "wise_ft.json", self._describe(points, best))
        print(f"best: alpha {best.alpha:.1f} ({wise_ft.RULE})")
        print(printable(f"written: {self.out / 'model'} and {self.out / 'wise_ft.json'}"))
        write_page(
            lambda page: page.write_wise_ft_page(self.out, self.start, self.finetuned, points, best, shown[best.alpha])
        )
        return 0

    def _describe(self, points: "list[Point]", best: "Point") -> dict[str, Any]:
        from diptych.train.finetune.wise_ft import RULE

        curve = [dataclasses.asdict(point) for point in points]
        return {"start": self.start, "finetuned": self.finetuned, "rule": RULE, "best": best.alpha, "curve": curve}


def _print_point(point: "Point", names: list[str]) -> None:
    values = "  ".join(f"{point.metrics[name]:{len(name)}.2%}" for name in names)
    print(f"{point.alpha:5.1f}  {point.score:6.2%}  {values}", flush=True)
