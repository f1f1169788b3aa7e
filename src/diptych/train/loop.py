"""The training loop: setup, resume, step, log, evaluate, checkpoint, in this order.

Resume is exact. What is stored (weights, optimizer, random state, position in the data, length of the log) and what
is recomputed from it (sample order, crops, patches, learning rate) leave nothing that could differ, so that a run that
was killed ends with the same bits as one that was not. The number of ranks is no part of a run: it may change between
two starts, and changes nothing but the order in which floating-point numbers are added.
"""

import json
import math
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diptych import files, ranks
from diptych.checkpoint import native
from diptych.checkpoint.loaded import Loaded, build_meta
from diptych.config import from_dict, to_dict
from diptych.errors import NonFiniteLossError, NotFoundError, UsageError
from diptych.image import Preprocess, open_picture
from diptych.model.clip import CLIP, MAX_LOGIT_SCALE, CLIPOutput, Output
from diptych.ranks import Ranks
from diptych.shards.loader import Batch, Loader, Position, StoredFeatures
from diptych.tokenizer import Tokenizer
from diptych.train import features, guard, lora, parallel, sharded
from diptych.train.config import OptimConfig, RunConfig, TrainConfig
from diptych.train.groups import group_pairs
from diptych.train.keep import Keeper, locked
from diptych.train.logs import METRICS, SKIPPED, TIMING, Logs
from diptych.train.loss import clip_loss, initial_logit_bias, siglip_loss
from diptych.train.micro import choose_micro_batch_size
from diptych.train.optim import build_optimizer, learning_rate, optimizer_tensors, restore_optimizer
from diptych.train.start import choose_lr_scales, count_trained, load_start, lock
from diptych.train.step import Step

Evaluator = Callable[[CLIP], Mapping[str, float]]
"""Takes the model in evaluation mode, returns named numbers. Training is given evaluators, it never imports them."""

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What evaluators say after a step; of a fine-tuned model also what they said before the first one."""

    step: int
    steps: int
    metrics: Mapping[str, float]
    start: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step, as it is logged and shown."""

    step: int
    steps: int
    loss: float
    lr: float
    logit_scale: float
    """exp(t): what similarities are multiplied with."""
    grad_norm_image: float
    """Length of the image tower's gradient, before any shortening."""
    grad_norm_text: float
    samples_seen: int
    pairs_per_second: float
    """Over the steps since the last report, all ranks together."""
    data_wait: float
    """Share of the time that was spent waiting for data, 0..1."""
    memory: int
    """Most memory that this rank has held so far, bytes: of the GPU, or of the process."""
    seconds_left: float


CLOCK = ("pairs_per_second", "data_wait", "memory", "seconds_left")
"""What depends on the clock and the machine, and so stands in timing.jsonl."""


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
    start_metrics: dict[str, float]
    """Fine-tuning: of the model it started from."""
    lost: tuple[str, ...]
    """Fine-tuning: metrics that fell by more than `stop_when_lost` points, which ended the run."""
    checkpoint: Path
    micro_batch_size: int
    """Pairs of a rank that were in memory at once."""
    stopped_by: str | None
    """Signal that ended the run before its last step."""
    seconds: float


@dataclass
class _State:
    """What changes from step to step besides weights and optimizer."""

    step: int = 0
    samples_seen: int = 0
    lr: float = 0.0
    loss: float = math.nan
    grad_norms: tuple[float, float] = (math.nan, math.nan)
    log_bytes: dict[str, int] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)
    start_metrics: dict[str, float] = field(default_factory=dict)


def run(
    config: TrainConfig,
    *,
    evaluators: Sequence[Evaluator] = (),
    on_step: Callable[[StepReport], None] = lambda _: None,
    on_evaluation: Callable[[Evaluation], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> TrainReport:
    """Train, or continue the unfinished run in `config.out`; on every rank of the job that the environment names."""
    us = ranks.connect(config.run.timeout, config.run.device)
    try:
        with ExitStack() as stack:
            stack.enter_context(ranks.lost_ranks_named(us))
            if us.is_first:
                stack.enter_context(locked(config.out))
            us.wait()
            trainer = _Trainer(config, us, on_note)
            return _run(trainer, evaluators, on_step, on_evaluation)
    finally:
        ranks.disconnect(us)


def _run(
    trainer: "_Trainer",
    evaluators: Sequence[Evaluator],
    on_step: Callable[[StepReport], None],
    on_evaluation: Callable[[Evaluation], None],
) -> TrainReport:
    started, config, us = time.monotonic(), trainer.config, trainer.ranks
    resumed_from, passed_over = trainer.resume()
    clock = _Clock(trainer.steps, config.loader.batch_size, trainer.device)
    with closing(iter(trainer.loader)) as batches, closing(trainer), _Signals() as signals:
        if config.start_model is not None and not trainer.state.step and evaluators:
            on_evaluation(trainer.evaluate(evaluators))
        while trainer.state.step < trainer.steps and not trainer.lost():
            trainer.train_step(clock.take(batches))
            trainer.log_step(report := clock.report(trainer.state, trainer.model))
            on_step(report)
            if trainer.is_due(trainer.evaluate_every) and evaluators:
                on_evaluation(trainer.evaluate(evaluators))
            stop = us.largest(float(signals.number)) if us.world_size > 1 else signals.number
            late = us.largest(float(trainer.keeper.is_late())) if config.run.checkpoint_minutes else False
            if stop or late or trainer.lost() or trainer.keeper.is_due(trainer.state.step, trainer.steps):
                trainer.save()
            if stop:
                break
    return TrainReport(
        steps=trainer.state.step,
        samples_seen=trainer.state.samples_seen,
        resumed_from=resumed_from,
        passed_over=passed_over,
        loss=trainer.state.loss,
        skipped=dict(Counter(reason for *_, reason in trainer.skipped_by_index) + trainer.state.skipped),
        metrics=trainer.state.metrics,
        start_metrics=trainer.state.start_metrics,
        lost=trainer.lost(),
        checkpoint=native.step_folder(config.out, trainer.state.step),
        micro_batch_size=trainer.micro_batch_size or 0,
        stopped_by=signals.name if trainer.state.step < trainer.steps else None,
        seconds=time.monotonic() - started,
    )


class _Trainer:
    """A run's moving parts on one rank."""

    def __init__(self, config: TrainConfig, us: Ranks, on_note: Callable[[str], None]) -> None:
        self.config, self.ranks = config, us
        self.device = choose_device(config.run.device, us)
        self.dtype = choose_dtype(config.run, self.device)
        start = load_start(config)
        self.tokenizer = start.tokenizer if start else load_tokenizer(config)
        self.preprocess = start.preprocess if start else Preprocess(image_size=config.model.vision.image_size)
        with us.one_after_the_other():  # the first rank indexes foreign shards, the others find the index
            self.loader = Loader(
                config.data,
                config.loader,
                config.model.vision.image_size,
                self.tokenizer,
                rank=us.rank,
                world_size=us.world_size,
                prepare=lambda data: self.preprocess.pixels(open_picture(data)),
            )
        self.skipped_by_index = [s for source in self.loader.sources for s in source.dataset.skipped]
        self.steps = config.run.steps or math.ceil(config.run.epochs * self.loader.batches_per_epoch)
        self.steps = config.run.extend_to or self.steps
        if self.optim.warmup >= self.steps:
            raise UsageError(
                f"warmup {self.optim.warmup} takes all of the {self.steps} steps; "
                f"use --warmup {max(1, self.steps // 20)} or train longer"
            )
        self.model = (start.model if start else build_model(config)).to(self.device)
        if start:
            self._prepare_start(on_note)
        if config.run.recompute:
            parallel.recompute_blocks(self.model)
        self.module = parallel.wrap(self.model, us, config.run.sharding)
        scales = choose_lr_scales(self.model, config.start.layer_decay) if start else None
        self.optimizer = build_optimizer(self.model, config.optim, scales)
        self.state = _State()
        self.micro_batch_size = config.run.micro_batch_size
        self.keeper = Keeper(config.out, config.run)
        self.logs = Logs(config.out, config.run.log, active=us.is_first)
        self.step = Step(
            model=self.module,
            plain=self.model,
            criterion=self.criterion,
            preprocess=self.preprocess,
            device=self.device,
            precision=self.precision,
            seed=config.loader.seed,
            patch_dropout=config.loss.patch_dropout,
        )
        self._is_compiled = False

    def _prepare_start(self, on_note: Callable[[str], None]) -> None:
        """Fine-tuning: lock a tower and have its features, add LoRA's matrices."""
        start = self.config.start
        lock(self.model, start)
        reason = features.why_not(self.config, self.steps, self.loader.batches_per_epoch)
        if start.lock != "none" and reason:
            on_note(f"features of the locked {start.lock} tower are not kept: {reason}")
        elif not reason:
            self.loader.stored = self._store_features(on_note)
        if start.lora_rank is not None:
            lora.inject(self.model, start, self.config.loader.seed)
        trained, total = count_trained(self.model)
        on_note(f"fine-tuning {self.config.start_model}: {trained:,} of {total:,} numbers are trained")

    def _store_features(self, on_note: Callable[[str], None]) -> StoredFeatures:
        start = self.config.start
        tower = features.Tower(
            loaded=Loaded(self.model.eval(), self.preprocess, self.tokenizer),
            image=start.lock == "image",
            device=self.device,
            dtype=self.dtype,
            precision=self.precision,
            stored=np.dtype(start.feature_type),
        )

        def say(done: int, shards: int) -> None:
            on_note(f"features of the locked {start.lock} tower: shard {done} of {shards}")

        return features.store(start, tower, self.loader, self.ranks, say)

    @property
    def optim(self) -> OptimConfig:
        """Fine-tuning warms up over a tenth of the run at most."""
        optim = self.config.optim
        return replace(optim, warmup=min(optim.warmup, self.steps // 10)) if self.config.start_model else optim

    @property
    def evaluate_every(self) -> int | None:
        """Steps between evaluations: fine-tuning looks after every epoch unless it is told otherwise."""
        return self.config.run.evaluate_every or (self.loader.batches_per_epoch if self.config.start_model else None)

    def lost(self) -> tuple[str, ...]:
        """Metrics that fell by more than the guard allows."""
        state = self.state
        found = guard.lost(state.start_metrics, state.metrics, self.config.start.stop_when_lost)
        return tuple(change.name for change in found)

    @property
    def plain(self) -> CLIP:
        """The model as users load it: on this rank alone, and LoRA's matrices added to what they belong to."""
        model = parallel.whole(self.model)
        return model if self.config.start.lora_rank is None else lora.merged(model)

    def compile(self) -> None:
        """Compile the towers in place: names in the state dict stay as they are."""
        self._is_compiled = True
        self.model.visual.compile(dynamic=False)
        self.model.text.transformer.compile(dynamic=False)
        # Every length of text is a shape of its own; without this PyTorch would give up after eight and run eagerly.
        multiple = self.model.text.length_multiple = 8
        lengths = -(-self.config.model.text.context_length // multiple) + 1
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * lengths)

    def close(self) -> None:
        """Wait for copies, end the logs."""
        self.logs.close()
        self.keeper.close()

    # --- resume -------------------------------------------------------------------------------------------------

    def resume(self) -> tuple[int, tuple[str, ...]]:
        """Continue from the newest intact checkpoint in `out`, or start; refuse a run with other settings."""
        out = self.config.out
        found = None
        if self.ranks.is_first:
            files.remove_leftovers(out)
            passed_over = self.keeper.fetch()
            newest, damaged = native.newest_valid(out)
            if newest is not None:
                require_same_run(json.loads((out / CONFIG).read_text()), self.config)
            files.write_json(out / CONFIG, to_dict(self.config))
            found = newest, tuple(passed_over) + tuple(f"{folder.name}: {why}" for folder, why in damaged)
        newest, passed_over = self.ranks.tell(found)
        if newest is not None:
            self._restore(newest)
        self.logs.open(self.state.log_bytes)
        if not self.state.step:
            for shard, key, reason in self.skipped_by_index:
                self.logs.append(SKIPPED, {"shard": shard, "key": key, "reason": reason})
        return self.state.step, passed_over

    def _restore(self, folder: Path) -> None:
        training = native.load_training(folder)
        if self.config.start.lora_rank is None:
            parallel.fill(self.model, native.map_weights(self.model, folder))
        else:
            weights = native.map_weights(build_meta(self.config.model), folder)
            parallel.fill(self.model, lora.restored(self.model, weights, training.tensors))
        restore_optimizer(self.optimizer, self.model, training.tensors)
        torch.set_rng_state(training.tensors["rng.cpu"].clone())  # it wants memory that is aligned
        values = training.values
        self.dtype = getattr(torch, values["dtype"])  # what `auto` meant on the machine where the run began
        self.steps = self.config.run.extend_to or values["steps"]  # whatever the batch size says now
        if values["world_size"] == self.ranks.world_size and not self.config.run.micro_batch_size:
            self.micro_batch_size = values["micro_batch_size"]
        position = from_dict(Position, values["position"])
        self.loader.seek(replace(position, batch_size=self.config.loader.batch_size))
        self.keeper.best = tuple(values["best"]) if values["best"] else None
        self.state = _State(
            step=values["step"],
            samples_seen=values["samples_seen"],
            loss=values["loss"],
            log_bytes=values["log_bytes"],
            skipped=Counter(values["skipped"]),
            metrics=values["metrics"],
            start_metrics=values.get("start_metrics", {}),
        )

    # --- step ---------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> None:
        """Gradients of the batch, update. A loss that is not finite stops the run before the update."""
        lr = self.state.lr = learning_rate(self.state.step, self.steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.model.train(self.config.start_model is None)  # fine-tuning keeps the statistics of BatchNorm
        first = self.state.samples_seen + self.ranks.rank * len(batch.image)
        if self.micro_batch_size is None:
            self.micro_batch_size = choose_micro_batch_size(self.step, batch, self.ranks)
        if self.config.run.compile and not self._is_compiled:
            self.compile()
        groups = group_pairs(batch, self.config.loss.positives, self.ranks, self.device)
        value = self.step.gradients(batch, first, self.micro_batch_size, groups).item()
        if not math.isfinite(value):
            self._refuse(f"the loss is {value}", batch, lr)
        parallel.finish_gradients(self.model, self.ranks, self.config.run.sharding)
        self.state.grad_norms = self._grad_norms()
        if not math.isfinite(sum(self.state.grad_norms)):
            self._refuse("the gradient is not finite", batch, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.model.training:
            parallel.average_statistics(self.model, self.ranks)
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        self.state.step += 1
        self.state.samples_seen += self.config.loader.batch_size
        self.state.loss = value
        self._note_skipped(batch)

    def criterion(self, output: Output, groups: Tensor | None) -> Tensor:
        """The loss of the global batch, by this rank's features."""
        loss = clip_loss if isinstance(output, CLIPOutput) else siglip_loss
        return loss(*output, groups=groups, ranks=self.ranks)

    def _grad_norms(self) -> tuple[float, float]:
        """Of both towers; gradients are shortened to `max_grad_norm` if there is one."""
        towers = []
        for tower in (self.model.visual, self.model.text):
            gradients = [p.grad for p in tower.parameters() if p.grad is not None]
            towers.append(parallel.sum_of_squares(gradients) if gradients else torch.zeros((), device=self.device))
        norms = torch.stack(towers).sqrt()
        if (longest := self.config.optim.max_grad_norm) is not None:
            shorten = (longest / (norms.norm() + 1e-6)).clamp(max=1)
            torch._foreach_mul_(  # pyright: ignore[reportPrivateImportUsage]
                [p.grad for p in self.model.parameters() if p.grad is not None], shorten
            )
        image, text = norms.tolist()
        return image, text

    def _refuse(self, what: str, batch: Batch, lr: float) -> None:
        raise NonFiniteLossError(
            f"{what} at step {self.state.step + 1} (learning rate {lr:.3g}); the weights were not "
            f"updated. Samples: {', '.join(batch.keys[:5])}, ... Try a lower lr or a longer warmup"
        )

    def _note_skipped(self, batch: Batch) -> None:
        if self.ranks.sum(torch.tensor(len(batch.skipped), device=self.device)) == 0:
            return
        for skipped in self.ranks.gather_objects(batch.skipped):
            self.state.skipped.update(reason for _, reason in skipped)
            for key, reason in skipped:
                self.logs.append(SKIPPED, {"step": self.state.step, "key": key, "reason": reason})

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

    # --- log, evaluate, checkpoint ------------------------------------------------------------------------------

    def log_step(self, report: StepReport) -> None:
        """What must come out the same again goes to metrics.jsonl, what depends on the clock to timing.jsonl."""
        values = asdict(report)
        del values["steps"]
        self.logs.show(report.step, {f"train/{name}": value for name, value in values.items() if name != "step"})
        clock = {name: values.pop(name) for name in CLOCK}
        self.logs.append(METRICS, values)
        self.logs.append(TIMING, {"step": report.step, **clock})

    def evaluate(self, evaluators: Sequence[Evaluator]) -> Evaluation:
        """Ask every evaluator about the model as it is; on every rank, so that they can share the work."""
        self.model.eval()
        model = self.plain
        model.eval()
        with torch.inference_mode():
            for evaluator in evaluators:
                self.state.metrics |= evaluator(model)
        if self.state.step:
            self.keeper.judge(self.state.step, self.state.metrics)
        else:
            self.state.start_metrics = dict(self.state.metrics)
        self.logs.append(METRICS, {"step": self.state.step, "evaluation": self.state.metrics})
        self.logs.show(self.state.step, {f"evaluation/{name}": value for name, value in self.state.metrics.items()})
        state = self.state
        return Evaluation(step=state.step, steps=self.steps, metrics=state.metrics, start=state.start_metrics)

    def save(self) -> None:
        """Write a checkpoint of this step: the whole model, whatever the ranks hold of it."""
        folder = native.step_folder(self.config.out, self.state.step)
        tensors = optimizer_tensors(self.optimizer, self.model) | {"rng.cpu": torch.get_rng_state()}
        if self.config.start.lora_rank is not None:
            tensors |= lora.parts(self.model)
        is_cut = parallel.is_cut(self.model)
        if self.ranks.is_first:
            self._write(folder, tensors, partial(sharded.write, ranks=self.ranks) if is_cut else native.save_tensors)
        elif is_cut:
            for file in (self.model.state_dict(), tensors):  # in the order of native.write
                sharded.write(file, None, self.ranks)
        self.ranks.wait()

    def _write(self, folder: Path, tensors: Mapping[str, Tensor], put: native.SaveTensors) -> None:
        values = {
            "step": self.state.step,
            "steps": self.steps,
            "samples_seen": self.state.samples_seen,
            "loss": self.state.loss,
            "position": to_dict(self.loader.position),
            "log_bytes": self.logs.sizes(),
            "skipped": dict(self.state.skipped),
            "metrics": self.state.metrics,
            "start_metrics": self.state.start_metrics,
            "best": self.keeper.best,
            "dtype": str(self.dtype).removeprefix("torch."),
            "world_size": self.ranks.world_size,
            "micro_batch_size": self.micro_batch_size,
            "config": to_dict(self.config),
        }
        native.save(
            folder,
            Loaded(
                self.model if self.config.start.lora_rank is None else lora.merged(self.model),
                self.preprocess,
                self.tokenizer,
            ),
            native.TrainingState(tensors=tensors, values=values),
            put,
        )
        if self.config.start_model and self.config.start.lora_rank is not None:
            lora.save(self.model, self.config.start, self.config.start_model, self.config.out / lora.ADAPTER)
        self.keeper.saved(self.state.step, [*self.logs.files(), self.config.out / CONFIG])


class _Signals:
    """SIGTERM and Ctrl-C end a run behind its step, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str | None:
        """Of the signal that came, if one did."""
        return signal.Signals(self.number).name if self.number else None

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


class _Clock:
    """How fast it goes, and what it waits for."""

    def __init__(self, steps: int, batch_size: int, device: torch.device) -> None:
        self.steps, self.batch_size, self.device = steps, batch_size, device
        self._last = time.monotonic()
        self._waited = 0.0
        self._smooth = 0.0

    def take(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; how long it took to come is in the next report."""
        began = time.monotonic()
        batch = next(batches)
        self._waited = time.monotonic() - began
        return batch

    def report(self, state: _State, model: CLIP) -> StepReport:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._smooth = 0.9 * self._smooth + 0.1 * seconds if self._smooth else seconds
        return StepReport(
            step=state.step,
            steps=self.steps,
            loss=state.loss,
            lr=state.lr,
            logit_scale=model.logit_scale.exp().item(),
            grad_norm_image=state.grad_norms[0],
            grad_norm_text=state.grad_norms[1],
            samples_seen=state.samples_seen,
            pairs_per_second=self.batch_size / seconds,
            data_wait=min(1.0, self._waited / seconds),
            memory=peak_memory(self.device),
            seconds_left=self._smooth * (self.steps - state.step),
        )


def peak_memory(device: torch.device) -> int:
    """Most memory held so far, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build_model(config: TrainConfig) -> CLIP:
    """The model before its first step: random weights by the seed; the sigmoid loss begins as its paper says."""
    torch.manual_seed(config.loader.seed)
    model = CLIP(config.model)
    if model.logit_bias is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10))  # Zhai et al. 2023, section 3.2
            model.logit_bias.fill_(initial_logit_bias(config.loader.batch_size))
    return model


def choose_device(name: str, us: Ranks) -> torch.device:
    """`auto` takes a GPU if there is one; every rank of a machine its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", us.local_rank) if name == "cuda" and us.world_size > 1 else torch.device(name)


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


FREE_LOADER = ("batch_size", "workers", "prefetch", "cache", "cache_bytes")
FREE_RUN = (
    *("checkpoint_every", "checkpoint_minutes", "keep_last", "keep_best", "mirror", "evaluate_every", "log"),
    *("device", "micro_batch_size", "sharding", "recompute", "timeout", "extend_to"),
)
FREE_START = ("cache_features", "feature_cache", "stop_when_lost")
"""What may differ when a run is continued: the number of ranks may too, which is in no config."""


def require_same_run(stored: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to mix two runs in one folder; what does not change the result may differ."""
    theirs = from_dict(TrainConfig, stored)
    free = {
        "out": config.out,
        "loader": replace(theirs.loader, **{name: getattr(config.loader, name) for name in FREE_LOADER}),
        "run": replace(theirs.run, **{name: getattr(config.run, name) for name in FREE_RUN}),
        "start": replace(theirs.start, **{name: getattr(config.start, name) for name in FREE_START}),
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
