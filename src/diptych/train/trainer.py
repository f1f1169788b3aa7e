"""A run on one rank: its moving parts, and the loop that resumes, steps, logs, evaluates and checkpoints."""

import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diptych import files
from diptych.checkpoint.formats import native
from diptych.checkpoint.loaded import Loaded, build_meta
from diptych.checkpoint.weights.write import on_first
from diptych.config import from_dict, to_dict
from diptych.errors import NonFiniteLossError, UsageError
from diptych.image import Preprocess, open_picture
from diptych.model.clip import CLIP, MAX_LOGIT_SCALE
from diptych.model.device import choose_device
from diptych.model.operators import allow_shapes, scale_all
from diptych.ranks import Ranks
from diptych.shards.loader import Batch, Loader, Position, StoredFeatures
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.finetune import features, guard, lora
from diptych.train.finetune.start import choose_lr_scales, count_trained, load_start, lock
from diptych.train.optim import build_optimizer, learning_rate, optimizer_tensors, restore_optimizer
from diptych.train.parallel import wrap as parallel
from diptych.train.parallel.micro_batch import choose_micro_batch_size
from diptych.train.recipe import SMALL_DATA
from diptych.train.run_folder.checkpoints import CheckpointManager
from diptych.train.run_folder.logs import METRICS, SKIPPED, TIMING, Logs
from diptych.train.run_folder.report import CLOCK, Clock, Evaluation, State, StepReport, TrainReport
from diptych.train.run_folder.resume import read_settings, require_same_run
from diptych.train.setup import build_model, load_tokenizer
from diptych.train.step import Step, choose_dtype, group_pairs

Evaluator = Callable[[CLIP], Mapping[str, float]]
"""Takes the model in evaluation mode, returns named numbers. Training is given evaluators, it never imports them."""

CONFIG = "config.json"
LOOKED_AT = 1000
"""Captions of each source that are looked at before a run begins."""


class Trainer:
    """A run's moving parts on one rank."""

    def __init__(self, config: TrainConfig, ranks: Ranks, on_note: Callable[[str], None]) -> None:
        self.config, self.ranks = config, ranks
        self.device = choose_device(config.run.device, ranks)
        dtype = choose_dtype(config.run, self.device)
        start = load_start(config)
        self.tokenizer = start.tokenizer if start else load_tokenizer(config)
        self.preprocess = start.preprocess if start else Preprocess(image_size=config.model.vision.image_size)
        with ranks.one_after_the_other():  # the first rank indexes foreign shards, the others find the index
            self.loader = Loader(
                config.data,
                config.loader,
                config.model.vision.image_size,
                self.tokenizer,
                rank=ranks.rank,
                world_size=ranks.world_size,
                prepare=lambda data: self.preprocess.pixels(open_picture(data)),
            )
        self.skipped_by_index = [s for source in self.loader.sources for s in source.dataset.skipped]
        self.steps = config.run.steps or math.ceil(config.run.epochs * self.loader.batches_per_epoch)
        self.steps = config.run.extend_to or self.steps
        if self.optim.warmup >= self.steps:
            smaller = "--recipe small-data, " if self.optim.warmup > SMALL_DATA.optim.warmup else ""
            raise UsageError(
                f"warmup {self.optim.warmup} takes all of the {self.steps} steps; "
                f"use {smaller}--warmup {max(1, self.steps // 20)} or train longer"
            )
        self.model = (start.model if start else build_model(config)).to(self.device)
        self.origin = {"tokenizer": self.tokenizer.fingerprint}
        """What the run began with and reads again, by hash; it may not have changed when the run goes on."""
        if start:
            self._prepare_start(dtype, on_note)
        if config.run.recompute:
            parallel.recompute_blocks(self.model)
        self.module = parallel.wrap(self.model, ranks, config.run.sharding)
        scales = choose_lr_scales(self.model, config.start.layer_decay) if start else None
        self.optimizer = build_optimizer(self.model, config.optim, scales)
        self.state = State()
        self.micro_batch_size = config.run.micro_batch_size
        self.keeper = CheckpointManager(config.out, config.run)
        self.logs = Logs(config.out, config.run.log, active=ranks.is_first)
        self.step = Step(
            model=self.module,
            plain=self.model,
            ranks=ranks,
            preprocess=self.preprocess,
            device=self.device,
            dtype=dtype,
            seed=config.loader.seed,
            patch_dropout=config.loss.patch_dropout,
        )
        self._is_compiled = False
        self._introduce(dtype, on_note)

    def _introduce(self, dtype: torch.dtype, on_note: Callable[[str], None]) -> None:
        """Say what this run is before its first step, and how many of its captions are longer than the model reads."""
        config, sources = self.config, self.loader.sources
        pairs = sum(len(source.dataset) for source in sources)
        numbers = sum(parameter.numel() for parameter in self.model.parameters())
        on_note(
            f"{pairs:,} pairs, {self.steps:,} steps of {config.loader.batch_size:,}; {numbers:,} parameters; "
            f"{self.device}, {str(dtype).removeprefix('torch.')}; {config.out}"
        )
        captions = [one for source in sources for one in islice(source.dataset.captions, LOOKED_AT)]
        if cut := self.tokenizer.encode_batch(captions).truncated:
            length = self.tokenizer.context_length
            on_note(f"{cut:,} of the first {len(captions):,} captions are longer than {length} tokens and are cut")

    def _prepare_start(self, dtype: torch.dtype, on_note: Callable[[str], None]) -> None:
        """Fine-tuning: lock a tower and have its features, add LoRA's matrices."""
        start = self.config.start
        lock(self.model, start)
        reason = features.why_not(self.config, self.steps, self.loader.batches_per_epoch)
        if start.lock != "none" and reason:
            on_note(f"features of the locked {start.lock} tower are not kept: {reason}")
        elif not reason:
            self.loader.stored = self._store_features(dtype, on_note)
        if start.lora_rank is not None:
            lora.inject(self.model, start, self.config.loader.seed)
        trained, total = count_trained(self.model)
        on_note(f"fine-tuning {self.config.start_model}: {trained:,} of {total:,} numbers are trained")

    def _store_features(self, dtype: torch.dtype, on_note: Callable[[str], None]) -> StoredFeatures:
        start = self.config.start
        tower = features.LockedTower(
            loaded=Loaded(self.model.eval(), self.preprocess, self.tokenizer),
            image=start.lock == "image",
            device=self.device,
            dtype=dtype,
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

    def _lost(self) -> tuple[str, ...]:
        """Metrics that fell by more than the guard allows."""
        state = self.state
        found = guard.lost(state.start_metrics, state.metrics, self.config.start.stop_when_lost)
        return tuple(change.name for change in found)

    def run(
        self,
        evaluators: Sequence[Evaluator],
        on_step: Callable[[StepReport], None],
        on_evaluation: Callable[[Evaluation], None],
    ) -> TrainReport:
        """The training loop: resume, then step, log, evaluate, checkpoint until the last step or a reason to stop."""
        started, config = time.monotonic(), self.config
        for evaluator in evaluators:
            self.origin |= getattr(evaluator, "origin", {})
        resumed_from, passed_over = self.resume()
        state = self.state
        clock = Clock(self.steps, config.loader.batch_size, self.device)
        with closing(self.keeper), closing(self.logs), closing(iter(self.loader)) as batches, _Signals() as signals:
            if config.start_model is not None and not state.step and evaluators:
                on_evaluation(self._evaluate(evaluators))
            while state.step < self.steps and not self._lost():
                self._train_step(clock.take(batches))
                self._log_step(report := clock.report(state, self.model))
                on_step(report)
                is_last = state.step == self.steps
                if evaluators and (is_last or (self.evaluate_every and state.step % self.evaluate_every == 0)):
                    on_evaluation(self._evaluate(evaluators))
                stop = self.ranks.all_reduce_max(float(signals.number))
                late = config.run.checkpoint_minutes and self.ranks.all_reduce_max(float(self.keeper.is_late()))
                if stop or late or self._lost() or self.keeper.is_due(state.step, self.steps):
                    self.save()
                if stop:
                    break
        return TrainReport(
            steps=state.step,
            samples_seen=state.samples_seen,
            resumed_from=resumed_from,
            passed_over=passed_over,
            loss=state.loss,
            skipped=dict(Counter(reason for *_, reason in self.skipped_by_index) + state.skipped),
            metrics=state.metrics,
            start_metrics=state.start_metrics,
            lost=self._lost(),
            checkpoint=native.step_folder(config.out, state.step),
            micro_batch_size=self.micro_batch_size or 0,
            stopped_by=signals.name if state.step < self.steps else None,
            seconds=time.monotonic() - started,
        )

    def _compile(self) -> None:
        """Compile the towers in place: names in the state dict stay as they are."""
        self._is_compiled = True
        self.model.visual.compile(dynamic=False)
        self.model.text.transformer.compile(dynamic=False)
        # Every length of text is a shape of its own.
        multiple = self.model.text.length_multiple = 8
        lengths = -(-self.config.model.text.context_length // multiple) + 1
        allow_shapes(4 * lengths)

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
                require_same_run(read_settings(out / CONFIG), self.config)
            files.write_json(out / CONFIG, to_dict(self.config))
            found = newest, tuple(passed_over) + tuple(f"{folder.name}: {why}" for folder, why in damaged)
        newest, passed_over = self.ranks.broadcast(found)
        if newest is not None:
            self._restore(newest)
        self.logs.open(self.state.log_bytes)
        if not self.state.step:
            for shard, key, reason in self.skipped_by_index:
                self.logs.append(SKIPPED, {"shard": shard, "key": key, "reason": reason})
        return self.state.step, passed_over

    def _restore(self, folder: Path) -> None:
        training = native.load_training(folder)
        before = training.values.get("origin", {})
        if changed := [name for name, value in self.origin.items() if before.get(name, value) != value]:
            raise UsageError(
                f"the {changed[0]} is not the one that the run in {self.config.out} began with; put that back, or name "
                f"{'the set otherwise' if changed[0].startswith('evaluation') else 'another out'}"
            )
        self.origin = before | self.origin
        if self.config.start.lora_rank is None:
            parallel.fill(self.model, native.map_weights(self.model, folder))
        else:
            weights = native.map_weights(build_meta(self.config.model), folder)
            parallel.fill(self.model, lora.restored(self.model, weights, training.tensors))
        restore_optimizer(self.optimizer, self.model, training.tensors)
        torch.set_rng_state(training.tensors["rng.cpu"].clone())  # it wants memory that is aligned
        values = training.values
        dtype = getattr(torch, values["dtype"])  # what `auto` meant on the machine where the run began
        self.step = replace(self.step, dtype=dtype)
        self.steps = self.config.run.extend_to or values["steps"]  # whatever the batch size says now
        if values["world_size"] == self.ranks.world_size and not self.config.run.micro_batch_size:
            self.micro_batch_size = values["micro_batch_size"]
        position = from_dict(Position, values["position"])
        self.loader.seek(replace(position, batch_size=self.config.loader.batch_size))
        self.keeper.best = tuple(values["best"]) if values["best"] else None
        self.state = State(
            step=values["step"],
            samples_seen=values["samples_seen"],
            loss=values["loss"],
            log_bytes=values["log_bytes"],
            skipped=Counter(values["skipped"]),
            metrics=values["metrics"],
            start_metrics=values.get("start_metrics", {}),
        )

    # --- step ---------------------------------------------------------------------------------------------------

    def _train_step(self, batch: Batch) -> None:
        """Gradients of the batch, update. A loss that is not finite stops the run before the update."""
        lr = self.state.lr = learning_rate(self.state.step, self.steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.model.train(self.config.start_model is None)  # fine-tuning keeps the statistics of BatchNorm
        first = self.state.samples_seen + self.ranks.rank * len(batch.image)
        if self.micro_batch_size is None:
            self.micro_batch_size = choose_micro_batch_size(self.step, batch, self.ranks)
        if self.config.run.compile and not self._is_compiled:
            self._compile()
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

    def _grad_norms(self) -> tuple[float, float]:
        """Gradient norms of both towers; gradients are shortened to `max_grad_norm` if there is one."""
        towers = []
        for tower in (self.model.visual, self.model.text):
            gradients = [p.grad for p in tower.parameters() if p.grad is not None]
            towers.append(parallel.sum_of_squares(gradients) if gradients else torch.zeros((), device=self.device))
        norms = torch.stack(towers).sqrt()
        if (longest := self.config.optim.max_grad_norm) is not None:
            shorten = (longest / (norms.norm() + 1e-6)).clamp(max=1)
            scale_all([p.grad for p in self.model.parameters() if p.grad is not None], shorten)
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

    # --- log, evaluate, checkpoint ------------------------------------------------------------------------------

    def _log_step(self, report: StepReport) -> None:
        """Write to metrics.jsonl what must come out the same again, and to timing.jsonl what depends on the clock."""
        values = asdict(report)
        del values["steps"]
        self.logs.show(report.step, {f"train/{name}": value for name, value in values.items() if name != "step"})
        clock = {name: values.pop(name) for name in CLOCK}
        self.logs.append(METRICS, values)
        self.logs.append(TIMING, {"step": report.step, **clock})

    def _evaluate(self, evaluators: Sequence[Evaluator]) -> Evaluation:
        """Ask every evaluator about the model as it is; on every rank, so that they can share the work."""
        self.model.eval()
        model = parallel.whole(self.model)
        model = model if self.config.start.lora_rank is None else lora.merged(model)
        model.eval()
        with torch.inference_mode():
            found = [evaluator(model) for evaluator in evaluators]
        self.state.metrics = {name: value for metrics in found for name, value in metrics.items()}
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
        config, state = self.config, self.state
        uses_lora = config.start.lora_rank is not None
        tensors = optimizer_tensors(self.optimizer, self.model) | {"rng.cpu": torch.get_rng_state()}
        values = {
            "step": state.step,
            "steps": self.steps,
            "samples_seen": state.samples_seen,
            "loss": state.loss,
            "position": to_dict(self.loader.position),
            "log_bytes": self.logs.sizes(),
            "skipped": dict(state.skipped),
            "metrics": state.metrics,
            "start_metrics": state.start_metrics,
            "best": self.keeper.best,
            "dtype": str(self.step.dtype).removeprefix("torch."),
            "world_size": self.ranks.world_size,
            "micro_batch_size": self.micro_batch_size,
            "config": to_dict(config),
            "origin": self.origin,
        }
        native.save(
            native.step_folder(config.out, state.step),
            Loaded(lora.merged(self.model) if uses_lora else self.model, self.preprocess, self.tokenizer),
            native.TrainingState(tensors=tensors | (lora.parts(self.model) if uses_lora else {}), values=values),
            self.ranks,
        )

        def finish() -> None:
            if config.start_model and uses_lora:
                lora.save(self.model, config.start, config.start_model, config.out / lora.ADAPTER)
            self.keeper.saved(state.step, [*self.logs.files(), config.out / CONFIG])

        on_first(self.ranks, finish)


class _Signals:
    """SIGTERM and Ctrl-C end a run behind its step, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str | None:
        """Name of the signal that came, if one did."""
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
