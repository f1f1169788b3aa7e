"""The training loop: setup, resume, step, log, evaluate, checkpoint, in this order.

Resume is exact. What is stored (weights, optimizer, random state, position in the data, length of the log) and what
is recomputed from it (sample order, crops, learning rate) leave nothing that could differ, so that a run that was
killed ends with the same bits as one that was not.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diptych import files
from diptych.checkpoint import native
from diptych.checkpoint.loaded import Loaded
from diptych.config import from_dict, to_dict
from diptych.errors import NonFiniteLossError, NotFoundError, UsageError
from diptych.image import Preprocess
from diptych.model.clip import CLIP, MAX_LOGIT_SCALE
from diptych.shards.loader import Batch, Loader, Position
from diptych.tokenizer import Tokenizer
from diptych.train.config import RunConfig, TrainConfig
from diptych.train.loss import clip_loss
from diptych.train.optim import build_optimizer, learning_rate

Evaluator = Callable[[CLIP], Mapping[str, float]]
"""Takes the model in evaluation mode, returns named numbers. Training is given evaluators, it never imports them."""

METRICS, TIMING, SKIPPED, CONFIG = "metrics.jsonl", "timing.jsonl", "skipped.jsonl", "config.json"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step, as it is logged and shown."""

    step: int
    steps: int
    loss: float
    lr: float
    logit_scale: float
    """exp(t): what similarities are multiplied with."""
    samples_seen: int
    pairs_per_second: float
    """Over the steps since the last report."""
    data_wait: float
    """Share of the time that was spent waiting for data, 0..1."""
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """How a run ended."""

    steps: int
    samples_seen: int
    resumed_from: int
    """Step the run was continued from; 0 for a fresh one."""
    passed_over: tuple[str, ...]
    """Checkpoints that were damaged and so not continued from, with the reason."""
    loss: float
    skipped: dict[str, int]
    """Pictures that could not be used, by reason: in the shards' indexes and while training."""
    metrics: dict[str, float]
    """Of the last evaluation."""
    checkpoint: Path
    seconds: float


@dataclass
class _State:
    """What changes from step to step besides weights and optimizer."""

    step: int = 0
    loss: float = math.nan
    log_bytes: dict[str, int] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)


def run(
    config: TrainConfig,
    *,
    evaluators: Sequence[Evaluator] = (),
    on_step: Callable[[StepReport], None] = lambda _: None,
) -> TrainReport:
    """Train, or continue the unfinished run in `config.out`."""
    started = time.monotonic()
    trainer = _Trainer(config)
    resumed_from, passed_over = trainer.resume()
    trainer.open_logs()
    clock = _Clock(trainer.steps, config.loader.batch_size)
    with closing(iter(trainer.loader)) as batches:
        while trainer.state.step < trainer.steps:
            trainer.train_step(clock.take(batches))
            trainer.log_step(report := clock.report(trainer.state, trainer.optimizer, trainer.model))
            on_step(report)
            if trainer.is_due(config.run.evaluate_every):
                trainer.evaluate(evaluators)
            if trainer.is_due(config.run.checkpoint_every):
                trainer.save()
    return TrainReport(
        steps=trainer.state.step,
        samples_seen=trainer.state.step * config.loader.batch_size,
        resumed_from=resumed_from,
        passed_over=tuple(f"{folder.name}: {why}" for folder, why in passed_over),
        loss=trainer.state.loss,
        skipped=dict(Counter(reason for *_, reason in trainer.skipped_by_index) + trainer.state.skipped),
        metrics=trainer.state.metrics,
        checkpoint=native.step_folder(config.out, trainer.state.step),
        seconds=time.monotonic() - started,
    )


class _Trainer:
    """A run's moving parts."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        self.dtype = choose_dtype(config.run, self.device)
        self.tokenizer = load_tokenizer(config)
        self.loader = Loader(config.data, config.loader, config.model.vision.image_size, self.tokenizer)
        self.skipped_by_index = [s for source in self.loader.sources for s in source.dataset.skipped]
        self.steps = config.run.steps or math.ceil(config.run.epochs * self.loader.batches_per_epoch)
        if config.optim.warmup >= self.steps:
            raise UsageError(
                f"warmup {config.optim.warmup} takes all of the {self.steps} steps; "
                f"use --warmup {max(1, self.steps // 20)} or train longer"
            )
        torch.manual_seed(config.loader.seed)
        self.preprocess = Preprocess(image_size=config.model.vision.image_size)
        self.model = CLIP(config.model).to(self.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.state = _State()
        if config.run.compile:
            self.compile()

    def compile(self) -> None:
        """Compile the towers in place: names in the state dict stay as they are."""
        self.model.visual.compile(dynamic=False)
        self.model.text.transformer.compile(dynamic=False)
        # Every length of text is a shape of its own; without this PyTorch would give up after eight and run eagerly.
        multiple = self.model.text.length_multiple = 8
        lengths = -(-self.config.model.text.context_length // multiple) + 1
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * lengths)

    # --- resume -------------------------------------------------------------------------------------------------

    def resume(self) -> tuple[int, list[tuple[Path, str]]]:
        """Continue from the newest intact checkpoint in `out`, or start; refuse a run with other settings."""
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(out)
        newest, passed_over = native.newest_valid(out)
        if newest is not None:
            require_same_run(json.loads((out / CONFIG).read_text()), self.config)
        files.write_json(out / CONFIG, to_dict(self.config))
        if newest is not None:
            self._restore(newest)
        return self.state.step, passed_over

    def _restore(self, folder: Path) -> None:
        native.load_weights(self.model, folder)
        training = native.load_training(folder)
        restore_optimizer(self.optimizer, self.model, training.tensors)
        torch.set_rng_state(training.tensors["rng.cpu"])
        values = training.values
        self.dtype = getattr(torch, values["dtype"])  # what `auto` meant on the machine where the run began
        self.loader.seek(from_dict(Position, values["position"]))
        self.state = _State(
            step=values["step"],
            loss=values["loss"],
            log_bytes=values["log_bytes"],
            skipped=Counter(values["skipped"]),
            metrics=values["metrics"],
        )

    # --- step ---------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> None:
        """Forward, loss, backward, update. A loss that is not finite stops the run before the update."""
        lr = learning_rate(self.state.step, self.steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        image = self.preprocess.normalize(batch.image.to(self.device, non_blocking=True))
        text = batch.text.to(self.device, non_blocking=True)
        with self.precision():
            output = self.model(image, text)
        loss = clip_loss(*output)
        if not math.isfinite(value := loss.item()):
            raise NonFiniteLossError(
                f"the loss is {value} at step {self.state.step + 1} (learning rate {lr:.3g}); the weights were not "
                f"updated. Samples: {', '.join(batch.keys[:5])}, ... Try a lower lr or a longer warmup"
            )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        self.state.step += 1
        self.state.loss = value
        self.state.skipped.update(reason for _, reason in batch.skipped)
        for key, reason in batch.skipped:
            self._append(SKIPPED, {"step": self.state.step, "key": key, "reason": reason})

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Matrix products in the run's type."""
        if self.dtype is torch.float32:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, self.dtype))
            if self.device.type == "cpu":  # the fused kernel's bfloat16 derivative is six times slower (LOG.md)
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens `every` so many steps, and at the end, happens now."""
        return self.state.step == self.steps or (every is not None and self.state.step % every == 0)

    # --- log ----------------------------------------------------------------------------------------------------

    def open_logs(self) -> None:
        """Cut the logs back to what the checkpoint knows of, so that no step is in them twice."""
        for name in (METRICS, SKIPPED):
            path = self.config.out / name
            path.touch()
            with open(path, "r+b") as log:
                log.truncate(self.state.log_bytes.get(name, 0))
        if not self.state.step:
            (self.config.out / TIMING).unlink(missing_ok=True)
            for shard, key, reason in self.skipped_by_index:
                self._append(SKIPPED, {"shard": shard, "key": key, "reason": reason})

    def log_step(self, report: StepReport) -> None:
        """What must come out the same again goes to metrics.jsonl, what depends on the clock to timing.jsonl."""
        values = asdict(report)
        clock = {name: values.pop(name) for name in ("pairs_per_second", "data_wait", "seconds_left")}
        del values["steps"]
        self._append(METRICS, values)
        self._append(TIMING, {"step": report.step, **clock})

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        with open(self.config.out / name, "a", encoding="utf-8") as log:
            log.write(json.dumps(values) + "\n")

    # --- evaluate and checkpoint --------------------------------------------------------------------------------

    def evaluate(self, evaluators: Sequence[Evaluator]) -> None:
        """Ask every evaluator about the model as it is."""
        if not evaluators:
            return
        self.model.eval()
        with torch.inference_mode():
            for evaluator in evaluators:
                self.state.metrics |= evaluator(self.model)
        self._append(METRICS, {"step": self.state.step, "evaluation": self.state.metrics})

    def save(self) -> None:
        """Write a checkpoint of this step."""
        logs = {name: (self.config.out / name).stat().st_size for name in (METRICS, SKIPPED)}
        values = {
            "step": self.state.step,
            "loss": self.state.loss,
            "position": to_dict(self.loader.position),
            "log_bytes": logs,
            "skipped": dict(self.state.skipped),
            "metrics": self.state.metrics,
            "dtype": str(self.dtype).removeprefix("torch."),
            "config": to_dict(self.config),
        }
        tensors = optimizer_tensors(self.optimizer, self.model) | {"rng.cpu": torch.get_rng_state()}
        native.save(
            native.step_folder(self.config.out, self.state.step),
            Loaded(self.model, self.preprocess, self.tokenizer),
            native.TrainingState(tensors=tensors, values=values),
        )


class _Clock:
    """How fast it goes, and what it waits for."""

    def __init__(self, steps: int, batch_size: int) -> None:
        self.steps, self.batch_size = steps, batch_size
        self._last = time.monotonic()
        self._waited = 0.0
        self._smooth = 0.0

    def take(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; how long it took to come is in the next report."""
        began = time.monotonic()
        batch = next(batches)
        self._waited = time.monotonic() - began
        return batch

    def report(self, state: _State, optimizer: torch.optim.Optimizer, model: CLIP) -> StepReport:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._smooth = 0.9 * self._smooth + 0.1 * seconds if self._smooth else seconds
        return StepReport(
            step=state.step,
            steps=self.steps,
            loss=state.loss,
            lr=optimizer.param_groups[0]["lr"],
            logit_scale=model.logit_scale.exp().item(),
            samples_seen=state.step * self.batch_size,
            pairs_per_second=self.batch_size / seconds,
            data_wait=min(1.0, self._waited / seconds),
            seconds_left=self._smooth * (self.steps - state.step),
        )


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(run: RunConfig, device: torch.device) -> torch.dtype:
    """The type of the towers' matrix products; `auto` asks the processor, not the clock, so it is the same again."""
    if run.precision == "auto":
        fast = device.type != "cpu" or torch.cpu.get_capabilities().get("amx_bf16", False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if run.precision == "bfloat16" else torch.float32


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of the run; it must fit the text tower."""
    text = config.model.text
    if config.tokenizer is not None and not config.tokenizer.is_dir():
        raise NotFoundError(f"no such tokenizer folder: {config.tokenizer}")
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else Tokenizer.clip()
    if tokenizer.vocab_size != text.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the text tower {text.vocab_size}; they must agree"
        )
    return replace(tokenizer, context_length=text.context_length)


def require_same_run(stored: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to mix two runs in one folder; what does not change the result may differ."""
    theirs = from_dict(TrainConfig, stored)
    free = {
        "out": config.out,
        "loader": replace(theirs.loader, workers=config.loader.workers, prefetch=config.loader.prefetch),
        "run": replace(
            theirs.run,
            checkpoint_every=config.run.checkpoint_every,
            evaluate_every=config.run.evaluate_every,
        ),
    }
    theirs, ours = to_dict(replace(theirs, **free)), to_dict(config)
    changed = sorted(name for name in ours if ours[name] != theirs[name])
    if changed:
        details = "; ".join(f"{name}: {_difference(theirs[name], ours[name])}" for name in changed)
        raise UsageError(
            f"{config.out} holds a run with other settings ({details}); repeat them to continue, or name another out"
        )


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
        return ", ".join(f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in keys)
    return f"{theirs} there, {ours} here"


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: CLIP) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `exp_avg.visual.conv1.weight`, ..."""
    return {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: CLIP, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    for name, parameter in model.named_parameters():
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors[f"{kind}.{name}"]
            # A copy on the parameter's device, laid out as the parameter: fused kernels pair elements by layout.
            state = torch.empty_like(parameter) if kind != "step" else torch.empty_like(value, device=parameter.device)
            optimizer.state[parameter][kind] = state.detach().copy_(value)
