"""The table of commands. Each imports its rooms when it runs, so that `--help` answers at once.

This is the only module that prints.
"""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from diptych.checkpoint.config import LayoutName, Precision, Resize
from diptych.config import to_dict
from diptych.errors import DiptychError, NotFoundError, PictureError, UsageError
from diptych.model.config import Activation, get_preset
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.train.config import LossConfig, OptimConfig, RunConfig, TrainConfig
from diptych.train.plan import PlanConfig, PlanReport

if TYPE_CHECKING:
    from diptych.train.loop import Evaluator, StepReport, TrainReport

DEFAULT_MODEL = Path("runs/demo")
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model from scratch, or continue the unfinished run in --out."""

    preset: Annotated[str, tyro.conf.Positional]
    """Architecture by name: ViT-B-32, RN50, ViT-Ti-16, ..."""
    data: tuple[str, ...]
    """Folders of shards or tars; PATH@0.5 sees half of it in an epoch, PATH@2 all of it twice."""
    out: Path
    """The run's folder: checkpoints, logs, config."""
    tokenizer: Path | None = None
    """Folder of a tokenizer of one's own; by default OpenAI's vocabulary."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __call__(self) -> int:
        model = dataclasses.replace(get_preset(self.preset), logit_bias=self.loss.loss == "siglip")
        if self.tokenizer is not None:
            from diptych.tokenizer import Tokenizer

            text = dataclasses.replace(model.text, vocab_size=Tokenizer.load(self.tokenizer).vocab_size)
            model = dataclasses.replace(model, text=text)
        config = TrainConfig(
            model=model,
            data=tuple(SourceConfig.parse(text) for text in self.data),
            out=self.out,
            tokenizer=self.tokenizer,
            loader=self.loader,
            loss=self.loss,
            optim=self.optim,
            run=self.run,
        )
        report = train_with_progress(config)
        if is_first_rank():
            print_train_report(report)
        return 128 + signal.Signals[report.stopped_by] if report.stopped_by else 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what a run will cost before it starts: memory of a device, bytes on the wire, time. Arithmetic."""

    preset: Annotated[str, tyro.conf.Positional]
    """Architecture by name: ViT-B-32, RN50, ViT-Ti-16, ..."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    json: bool = False
    """Print one JSON object instead of a table."""

    def __call__(self) -> int:
        from diptych.train import plan

        report = plan.run(self.plan, get_preset(self.preset))
        if self.json:
            print(json.dumps({"preset": self.preset, "config": to_dict(self.plan), **dataclasses.asdict(report)}))
        else:
            print_plan(self.preset, self.plan, report)
        return 0


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Name what is on pictures, choosing among labels the model was never trained on."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Pictures, folders of pictures, or globs."""
    labels: tuple[str, ...]
    """What to choose from; a|b gives two names to one class."""
    model: str | None = None
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai); by default
    the one that `make demo` made."""
    activation: Activation | None = None
    """Of a bare file that does not show which activation it was trained with."""
    templates: tuple[str, ...] = ("simple",)
    """Names of template lists (simple, imagenet_80, imagenet_7, none), or templates with a {}."""
    top: int = 5
    """Labels to show for each picture."""
    json: bool = False
    """Print one JSON object a line instead of bars."""

    def __call__(self) -> int:
        from diptych.checkpoint.layouts import load
        from diptych.zeroshot import ZeroShotClassifier, load_templates

        paths = find_pictures(self.images)
        templates = [t for name in self.templates for t in ([name] if "{}" in name else load_templates(name))]
        names = [label.split("|") if "|" in label else label for label in self.labels]
        loaded = load(self.model or default_model(), activation=self.activation)
        classifier = ZeroShotClassifier(loaded, names, templates)
        failed = 0
        for path in paths:
            try:
                scores = classifier.predict_proba([path])[0]
            except PictureError as error:
                failed += 1
                print(f"{path}: skipped, {error}", file=sys.stderr)
                continue
            order = scores.argsort()[::-1][: self.top]
            answers = [(str(classifier.classes_[i]), float(scores[i])) for i in order]
            print_answers(path, answers, as_json=self.json)
        if failed:
            print(f"{failed} of {len(paths)} pictures were skipped", file=sys.stderr)
        return 1 if failed else 0


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a checkpoint is: architecture, activation and what shows it, preprocessing, tokenizer, types, hashes."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai)."""
    activation: Activation | None = None
    """Of a bare file that does not show which activation it was trained with."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __call__(self) -> int:
        from diptych.checkpoint.inspect import inspect

        found = inspect(self.model, activation=self.activation, preset=self.preset)
        if self.json:
            print(json.dumps(found, indent=2, ensure_ascii=False))
        else:
            print_inspection(found)
        return 0


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint in another layout; features before and after must agree, or nothing is written."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai)."""
    out: Annotated[Path, tyro.conf.Positional]
    """The new folder, or file (openai)."""
    to: LayoutName
    """The layout: our own folder, OpenCLIP's, transformers' (ViT only), OpenAI's state dict, or ONNX (no way back)."""
    precision: Precision = "float32"
    """Type of the weights that are written."""
    image_size: int | None = None
    """Resize the image tower's positions for pictures of another size, pixels."""
    resize: Resize = "open_clip"
    """How they are resized: bicubic with antialiasing (open_clip) or without (transformers)."""
    context_length: int | None = None
    """Make the text tower take another number of tokens."""
    activation: Activation | None = None
    """Of a bare file that does not show which activation it was trained with."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""
    overwrite: bool = False
    """Replace a checkpoint that is there."""

    def __call__(self) -> int:
        from diptych.checkpoint import layouts, surgery

        layouts.check_place(self.out, self.to, overwrite=self.overwrite)  # before minutes of work
        loaded = layouts.load(self.model, activation=self.activation, preset=self.preset)
        if self.image_size is not None:
            loaded = surgery.resize_image(loaded, self.image_size, self.resize)
        if self.context_length is not None:
            loaded = surgery.resize_context(loaded, self.context_length)
        differences = layouts.convert(loaded, self.out, self.to, precision=self.precision, overwrite=self.overwrite)
        for tower, difference in differences.items():
            print(f"{tower} features before and after differ by {difference:.1e} of their length")
        print(f"written: {self.out} ({self.to}, {self.precision})")
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read a checkpoint to its last byte: hashes, finite numbers, one forward pass."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai)."""
    activation: Activation | None = None
    """Of a bare file that does not show which activation it was trained with."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""

    def __call__(self) -> int:
        from diptych.checkpoint.inspect import verify

        found = verify(self.model, activation=self.activation, preset=self.preset)
        for name, sha256 in found.sha256.items():
            against = found.checked_against.get(name)
            print(f"sha256 {sha256}  {name}" + (f"  (agrees with {against})" if against else ""))
        print(f"{found.tensors} tensors, every number finite; temperature {found.temperature:.4g}")
        print(f"forward pass: {found.features}")
        print("sound" if found.checked_against else "sound, as far as a file without a stored hash can show")
        return 0


Command = Train | Plan | Classify | Inspect | Convert | Verify
COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "plan": Plan,
    "classify": Classify,
    "inspect": Inspect,
    "convert": Convert,
    "verify": Verify,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; our errors are one line and exit code 2."""
    command: Command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="diptych",
        description="Build and use CLIP models from end to end.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        code = command()
    except DiptychError as error:
        print(f"diptych: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def train_with_progress(config: TrainConfig, *, evaluators: "Sequence[Evaluator]" = ()) -> "TrainReport":
    """Run training under a progress bar: loss, pairs/s, share of time spent waiting for data, time left."""
    from diptych.train import loop

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task("training", total=None, status="")

    def show(report: "StepReport") -> None:
        if not is_first_rank():
            return
        progress.start()  # at the first step, so that an error before it stays one line
        minutes, seconds = divmod(int(report.seconds_left), 60)
        status = (
            f"loss {report.loss:.3f}  {report.pairs_per_second:.0f} pairs/s  "
            f"data wait {report.data_wait:.0%}  {minutes}:{seconds:02d} left"
        )
        progress.update(task, total=report.steps, completed=report.step, status=status)

    try:
        return loop.run(config, on_step=show, evaluators=evaluators)
    finally:
        if progress.live.is_started:
            progress.stop()


def is_first_rank() -> bool:
    """Whether this process speaks for its job (`torchrun` starts several)."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def print_train_report(report: "TrainReport") -> None:
    """Say how a run ended."""
    for line in report.passed_over:
        print(f"passed over a damaged checkpoint: {line}")
    if report.resumed_from:
        print(f"continued from step {report.resumed_from}")
    if report.skipped:
        print(f"skipped samples: {', '.join(f'{reason} {count}' for reason, count in report.skipped.items())}")
    print(f"step {report.steps}, {report.samples_seen} pairs seen, loss {report.loss:.4f}, {report.seconds:.0f} s")
    for name, value in report.metrics.items():
        print(f"  {name} {value:.4f}")
    print(f"checkpoint: {report.checkpoint}")
    if report.stopped_by:
        print(f"stopped by {report.stopped_by}; start the same command again to go on")


def print_plan(preset: str, config: PlanConfig, report: PlanReport) -> None:
    """What a run will cost: a table of components, then whether it fits."""
    sections = {
        "parameters": {name: f"{count:,}" for name, count in report.parameters.items()},
        "FLOPs per pair": {name: f"{flops / 1e9:,.2f} G" for name, flops in report.flops_per_pair.items() if flops},
        "memory of a device": {name: _gigabytes(size) for name, size in report.memory.items() if size},
        "sent by a device, a step": {name: _gigabytes(size) for name, size in report.wire.items() if size},
        "time": {name: _duration(seconds) for name, seconds in report.seconds.items() if seconds},
    }
    table = Table("", "", "", show_header=False, box=None)
    table.columns[2].justify = "right"
    for section, rows in sections.items():
        for i, (name, value) in enumerate(rows.items()):
            table.add_row("" if i else section, name.replace("_", " "), value)
    print(
        f"{preset}: {config.batch_size:,} pairs a step on {config.devices:,} {config.device_kind}, {config.pairs:,} "
        f"on each, {report.micro_batch_size:,} at once; {config.sharding}, {config.precision}"
    )
    Console().print(table)
    total, usable = _gigabytes(report.memory["total"]), _gigabytes(report.usable_memory)
    print(f"memory: {total} of {usable} that may be filled: {'fits' if report.fits else 'does not fit'}")
    if report.largest_micro_batch:
        print(f"largest micro-batch that fits: {report.largest_micro_batch:,} of the device's {config.pairs:,} pairs")
    else:
        print("not even one pair at a time fits; try --sharding fsdp, --recompute, --half-statistics or more --devices")
    print(
        f"time: at {config.utilisation:.0%} of the device's peak, an assumption (--utilisation); nothing was measured"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def print_answers(path: Path, answers: list[tuple[str, float]], *, as_json: bool) -> None:
    """One picture's labels: bars for people, JSON for machines."""
    if as_json:
        print(json.dumps({"image": str(path), "labels": [{"label": n, "probability": p} for n, p in answers]}))
        return
    table = Table(title=str(path), title_justify="left", show_header=False, box=None)
    for label, probability in answers:
        table.add_row(f"{probability:6.1%}", label, "█" * round(probability * 30))
    Console().print(table)


def print_inspection(found: dict[str, Any]) -> None:
    """What `diptych inspect` found, a line for each answer."""
    model, preprocess, tokenizer = found["model"], found["preprocess"], found["tokenizer"]
    vision, text, count = model["vision"], model["text"], found["parameters"]
    evidence = found["evidence"]
    if vision["type"] == "ResNetConfig":
        tower = f"ResNet, blocks {vision['layers']}, width {vision['width']}"
    else:
        blocks = f"{vision['layers']} layers of {vision['heads']} heads"
        tower = f"ViT, patch {vision['patch_size']}, width {vision['width']}, {blocks}"
    resize = {"shorter_side": "shorter side, centre crop", "squash": "squashed to a square"}[preprocess["resize"]]
    lines = {
        "path": found["path"],
        "layout": found["layout"],
        "architecture": found["architecture"],
        "image tower": f"{tower}, {vision['image_size']} px; {count['image']:,} parameters",
        "text tower": f"width {text['width']}, {text['layers']} layers of {text['heads']} heads, "
        f"{text['context_length']} tokens; {count['text']:,} parameters",
        "embedding": f"{model['embed_dim']} dimensions; {count['total']:,} parameters in all",
        "activation": f"{found['activation'] or 'not known'} ({evidence['activation']})",
        "preprocessing": f"{preprocess['image_size']} px, {preprocess['interpolation']}, {resize}; "
        f"mean {_numbers(preprocess['mean'])}, std {_numbers(preprocess['std'])}",
        "tokenizer": f"{tokenizer['vocabulary']} vocabulary, {tokenizer['vocab_size']:,} ids",
        "type": ", ".join(f"{name} {share:,}" for name, share in found["dtype"].items()),
    }
    if "heads" in evidence:
        lines["text tower"] += f" (heads: {evidence['heads']})"
    if "preprocessing" in evidence:
        lines["preprocessing"] += f" ({evidence['preprocessing']})"
    for name, answer in lines.items():
        print(f"{name + ':':15} {answer}")
    for name, file in found["files"].items():
        print(f"{'file:':15} {name}  {file['bytes']:,} bytes  sha256 {file['sha256']}")


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Files as they are, folders for the pictures in them, globs for what they match; in a stable order."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
        elif path.exists() or not any(sign in pattern for sign in "*?["):
            if not path.exists():
                raise NotFoundError(f"no such picture: {path}")
            found.append(path)
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            found += sorted(anchor.glob(str(path.relative_to(path.anchor) if path.is_absolute() else path)))
    if not found:
        raise NotFoundError(f"no pictures in {' '.join(patterns)} (looked for {' '.join(sorted(PICTURE_SUFFIXES))})")
    return found


def default_model() -> Path:
    """The model that is used when none is named."""
    if not DEFAULT_MODEL.is_dir():
        raise UsageError(f"no model was named and {DEFAULT_MODEL} does not exist; pass --model, or run `make demo`")
    return DEFAULT_MODEL
