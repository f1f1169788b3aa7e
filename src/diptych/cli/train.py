"""`diptych train`."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diptych.cli.shards import open_data
from diptych.cli.training import open_evaluators, run_and_report
from diptych.errors import UsageError
from diptych.model.config import PRESETS
from diptych.shards.config import LoaderConfig
from diptych.templates import parse_templates
from diptych.train.config import LossConfig, OptimConfig, RunConfig, TrainConfig
from diptych.train.recipe import CONTINUED, get_recipe

if TYPE_CHECKING:
    from diptych.evaluate.training_evaluators import TrainingEvaluator


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model from scratch, or continue the unfinished run in --out.

    Example: diptych train ViT-B-32 --data shards/ --out runs/mine
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """Architecture by name (ViT-B-32, RN50, ViT-Ti-16, ViT-B-16-SigLIP, ...), or a JSON or TOML file that says one: a
    model config of OpenCLIP's, or one's own."""
    data: tuple[str, ...]
    """Folders of shards, tars, or ranges of them, here or at a URL (s3://bucket/shards, shards/{00000..00099}.tar); or
    a CSV, JSON or folder of pairs, of which shards are made in the cache. PATH@0.5 sees half of it in an epoch, PATH@2
    all of it twice."""
    out: Path
    """The run's folder: checkpoints, logs, config."""
    recipe: str | None = None
    """Whole sets of values, any of which the options below change: `paper` (Tables 18 to 20 for each of its models),
    `small-data`. `diptych train ViT-B-16 --recipe paper --help` shows them."""
    tokenizer: Path | None = None
    """Folder of a tokenizer of one's own; by default OpenAI's vocabulary."""
    evaluate: tuple[str, ...] = ()
    """NAME=PATH of sets to be asked about during training: class folders of pictures, shards with labels (zero-shot
    accuracy) or with captions (retrieval). NAME=zeroshot:PATH or NAME=retrieval:PATH chooses."""
    templates: tuple[str, ...] = ("simple",)
    """For zero-shot sets: names of template lists (simple: a photo of a {}; none: the bare name; imagenet_80,
    imagenet_7), or templates with a {}. The checkpoint remembers them for `classify` and `evaluate`."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __call__(self) -> int:
        if self.recipe == "paper" and self.preset in CONTINUED:
            before = CONTINUED[self.preset]
            raise UsageError(
                f"the paper's {self.preset} is not trained from scratch, but is {before} trained for one more epoch; "
                f"train {before}, give it larger pictures with diptych convert --image-size, then continue it with "
                "diptych finetune"
            )
        from diptych.checkpoint.architectures import find_architecture
        from diptych.train.setup import fit_vocabulary, read_tokenizer

        model = dataclasses.replace(find_architecture(self.preset), logit_bias=self.loss.loss == "siglip")
        model = dataclasses.replace(model, text=fit_vocabulary(model.text, read_tokenizer(self.tokenizer)))
        if self.templates != ("simple",):
            model = dataclasses.replace(model, templates=parse_templates(self.templates))
        config = TrainConfig(
            model=model,
            data=open_data(self.data),
            out=self.out,
            tokenizer=self.tokenizer,
            loader=self.loader,
            loss=self.loss,
            optim=self.optim,
            run=self.run,
        )
        return run_and_report(config, self._open_evaluators(config))

    def _open_evaluators(self, config: TrainConfig) -> "list[TrainingEvaluator]":
        from diptych.image import Preprocess
        from diptych.train.setup import load_tokenizer

        preprocess = Preprocess(image_size=config.model.vision.image_size)
        templates = parse_templates(self.templates)
        return open_evaluators(self.evaluate, lambda: load_tokenizer(config), preprocess, templates, config)


def with_recipe(arguments: Sequence[str]) -> type[Train]:
    """The command whose defaults are those of the recipe that the command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", nargs="?")
    name = parser.parse_known_args(arguments)[0].recipe
    preset = next((argument for argument in arguments if argument in PRESETS), None)
    if name is None or preset is None:  # the latter is refused where all names are
        return Train
    recipe = get_recipe(name, preset)
    fields = [(part.name, part.type, getattr(recipe, part.name)) for part in dataclasses.fields(recipe)]
    namespace = {"__doc__": Train.__doc__}
    return dataclasses.make_dataclass("Train", fields, bases=(Train,), namespace=namespace, frozen=True, kw_only=True)
