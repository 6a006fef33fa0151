"""The training loop of all stages: step, log, save, validate, sample, stop, resume, release."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from dalle_dist import storage
from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.convert import find_checkpoint
from dalle_dist.checkpoint.manifest import read_manifest
from dalle_dist.checkpoint.save import Saver
from dalle_dist.config import Config
from dalle_dist.data.loader import MicroBatches, batches
from dalle_dist.data.notes import Notes
from dalle_dist.distributed import process_group
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.engine.deepspeed.known_step import check_known_step
from dalle_dist.engine.deepspeed.nvme_settings import claim_folder, on_nvme
from dalle_dist.errors import UserError
from dalle_dist.train.data import NAMED, Amiss
from dalle_dist.train.opening import opening
from dalle_dist.train.optimizer_step import Made, OptimizerSteps
from dalle_dist.train.prepare import prepared
from dalle_dist.train.release import write_release
from dalle_dist.train.rollback import Rollback
from dalle_dist.train.run import Run
from dalle_dist.train.skips import LastNorm, Skips, samples_of
from dalle_dist.train.speed import Speed
from dalle_dist.train.stage import Stage
from dalle_dist.train.state import TrainingState
from dalle_dist.train.stop import StopRequest, Switches
from dalle_dist.watch.watch import Watch

SAVING = 60.0  # seconds that a run which ends by an error gives a checkpoint that is being written


def train_stage(
    make: Callable[[Config, Ranks], Stage],
    config: Config,
    resume: str | None = None,
    new_epoch: bool = False,
) -> None:
    """Train until the stage's `steps`, then write the run's release folder from the averages.

    Args:
        make: the stage, from a config that is the same on all ranks.
        resume: "auto" goes on from the run's newest whole checkpoint, or starts if there is none; a
            path from that run or checkpoint; None starts a new run.
        new_epoch: a resumed run may have another training set, or its samples in another order;
            then it begins with the next epoch.

    Raises:
        ConfigError: sizes that do not fit the ranks, each other, or the run that is resumed.
        DataError: shards missing, damaged, or of another image tokenizer.
        CheckpointError: nothing whole to go on from, or not writable.
        UserError: the run folder is in use, or the loss is no longer a number.
    """
    storage.configure(config.data.cache or None, round(config.data.cache_gb * 1e9))
    ranks = process_group.init()
    stage = ranks.together(lambda: prepared(make, config, ranks, resume))
    run = Run(
        stage.run_path,
        config,
        ranks,
        resume=resume is not None,
        shape=stage.sections,
        texts=stage.texts,
        wandb=stage.settings.wandb,
    )
    try:
        with Watch(config.watch, stage.settings.steps, ranks, run, stage.alone) as watch:
            _Loop(stage, ranks, run, watch).run_to_the_end(resume, new_epoch)
    finally:
        run.close()


class _Loop:
    """One rank's part of a run."""

    def __init__(self, stage: Stage, ranks: Ranks, run: Run, watch: Watch) -> None:
        self.watch = watch
        self.stage, self.settings, self.ranks, self.run = stage, stage.settings, ranks, run
        self.speed = Speed(stage, ranks)
        check_known_step(self.settings, ranks)
        torch.manual_seed(stage.config.seed)
        self.engine = stage.build_engine(ranks)
        self.schedule = stage.schedule()
        self.state = TrainingState(
            stage.identity,
            ranks,
            self.engine,
            stage.ema(),
            self.schedule,
            stage.progress(),
            Skips(run.path, self.settings.section, self.settings.skip_budget),
        )
        self.saver = Saver(
            run.checkpoints,
            ranks,
            run.scratch,
            self.settings.keep,
            self.settings.keep_every,
            run.fence,
            claim_folder(self.settings.deepspeed) if on_nvme(self.settings.deepspeed) else None,
        )
        self.norm = LastNorm(run.path, self.settings.section)
        self.rollback = Rollback(stage.config.watch, run, ranks)
        self.amiss = Amiss(ranks, stage.config.data.bad_shards)
        self._micro_batch = self.settings.batch_size // (ranks.world * self.engine.accumulation)
        self._epoch: dict[str, float] = {}  # of an epoch that has ended, for the next log line
        self._saved = -1  # the step that was saved last
        # Weights whose loss is not finite may be past help: what is due waits for one that is.
        self._trusted, self._owed = True, False
        self.planned, self._logged = stage.planned(ranks), 0
        self._average_owed = False
        self._stop: StopRequest | None = None

    def run_to_the_end(self, resume: str | None, new_epoch: bool) -> None:
        try:
            self._train(resume, new_epoch)
        except Exception:
            self.saver.close(timeout=SAVING)  # what was trained so far is worth the wait
            raise

    def _train(self, resume: str | None, new_epoch: bool) -> None:
        self._restore(resume, new_epoch)
        step = self._logged = self.state.step
        rows = opening(self.stage, self.ranks, self.engine, self.planned, step)
        self.run.open(self.state.step)
        self.watch.opened()
        if resume is not None:
            self.run.rewind(self.state.step)
            self.rollback.pass_over(self.state)
            self._catch_up()
        if self.state.step < self.settings.steps:
            self._say_what_is_trained(rows)
            self._try_saving()
            self._run_steps()
            while self.rollback.due:
                self._go_back()
                self._run_steps()
        self.watch.now("ending", self.state.step)
        self.saver.wait()
        self.ranks.on_main(self.run.fence)  # no save is begun for a run that another took over
        complete = self.state.step == self.settings.steps
        if self._saved != self.state.step and (self._trusted or complete):
            self._save()
        self.saver.wait()
        self._sync()
        if self.state.step < self.settings.steps:
            self.run.say(f"stopped at step {self.state.step}; --resume auto goes on")
        else:
            self.state.skips.refuse_most()
            self._finish()

    def _say_what_is_trained(self, rows: str) -> None:
        self.run.say(rows)
        measures = self.stage.data_measures(self.ranks)
        if self.state.step == 0 and measures and not self.run.measured(0):
            self.run.log(0, **measures)

    def _try_saving(self) -> None:
        """Write a checkpoint and read it back, where the folder has none of this step.

        A full disk, a missing right, or ranks that do not share the folder show now, not after the
        first hours.
        """
        if self._saved == self.state.step:
            return
        began = time.perf_counter()
        self._save()
        self.saver.wait()
        written = time.perf_counter()
        checkpoint = store.step_folder(self.run.checkpoints, self.state.step)
        store.verify(checkpoint, self.ranks)
        read = time.perf_counter() - written
        size = self.ranks.on_main(lambda: read_manifest(checkpoint).size) / 1e9
        self.run.say(
            f"a checkpoint takes {size:.3g} GB; written in {written - began:.2f} s, read back in "
            f"{read:.2f} s ({size / max(read, 1e-3):.2g} GB/s)"
        )

    def _run_steps(self) -> None:
        stop = self._stop = self._stop or StopRequest()
        bar = self.run.progress(self.settings.steps, self.state.step)
        switches = Switches(self.run.path, self.run.main)
        incoming = Notes()
        micro_batches = self._micro_batches(incoming)
        try:
            steps = OptimizerSteps(
                self.stage,
                self.engine,
                self.ranks,
                micro_batches,
                incoming,
                self.amiss.notes,
                lambda: (
                    stop.asked or switches.stop or self.saver.failed or self.run.lost,
                    switches.take_save(),
                ),
                self.watch.own,
            )
            while (
                self.state.step < self.settings.steps
                and not steps.stopped
                and not self.rollback.due
            ):
                numbers = self._step(steps)
                self._owed |= steps.save
                if not self.rollback.due:
                    self._after_step(numbers, bar)
            self._check_norm()
        except RuntimeError as error:  # torch's, of a loader process that ended, comes at any time
            raise micro_batches.failure(error) or error from None
        finally:
            switches.close()
        bar.close()

    def _go_back(self) -> None:
        """To the newest checkpoint, past the samples of a spike."""
        self.watch.now("going back", self.state.step)
        self.saver.wait()
        self.rollback.go_back(self.state)
        self.norm = LastNorm(self.run.path, self.settings.section)
        self._saved, self._owed, self._trusted = self.state.step, False, True
        self._logged, self._average_owed, self._epoch = self.state.step, False, {}

    def _check_norm(self) -> None:
        try:
            self.norm.check()
        except UserError:
            if not self.rollback.lost():
                raise

    def _micro_batches(self, notes: Notes) -> MicroBatches:
        """This rank's, from the first that is not trained on yet, without end."""
        settings, ranks = self.settings, self.ranks
        return batches(
            self.stage.datasets[0],
            batch_size=settings.batch_size,
            micro_batch=self._micro_batch,
            rank=ranks.rank,
            world=ranks.world,
            start=self.state.progress.samples,
            workers=self.stage.config.data.workers,
            collate=self.stage.collate,
            notes=notes,
            pin_memory=ranks.device.type == "cuda",
        )

    def _step(self, steps: OptimizerSteps) -> dict[str, float]:
        """One optimizer step; the loss is that of the global batch, on any number of ranks."""
        self.watch.now("step", self.state.step)
        began, step = time.perf_counter(), self.state.step + 1
        lr, last = self.schedule.rate(step), step == self.settings.steps
        logged = self._due(step, self.settings.log_every)
        made = steps.make(step, lr, logged, last)
        self._check_norm()  # of the step before, which is there without a wait by now
        self.norm.take(made.norm, step, made.skipped)
        self._finished(made)
        if logged or self._due(step, self.settings.save_every):
            self._check_norm()
        self.speed.add(time.perf_counter() - began, made.waited)
        finite = math.isfinite(made.numbers["loss"])
        norm = made.norm.item() if logged and finite else math.nan
        return made.numbers | {"lr": lr, "grad_norm": norm}

    def _finished(self, made: Made) -> None:
        loss = made.numbers["loss"]
        finite = math.isfinite(loss)
        if not finite:
            self._name_samples(made)
        self.state.step += 1
        self.state.progress.samples += self.settings.batch_size
        self.rollback.see(self.state.step, loss)
        self._trusted = finite and not self.rollback.suspected
        if self.rollback.due:
            return
        self.state.skips.add(made.skipped, not finite)
        if finite:
            self.schedule.observe(self.state.step, loss)
        self._average()

    def _name_samples(self, made: Made) -> None:
        """Log the samples of the micro-batches whose loss is not finite; a collective call."""
        dataset, first = self.stage.datasets[0], self.state.progress.samples
        named = samples_of(dataset, made.suspects, first, self._micro_batch, self.ranks)
        step = self.state.step + 1
        self.run.note(step, bad_samples=named)
        shown = f"{'; '.join(named[:NAMED])}{'; ...' if len(named) > NAMED else ''}"
        self.run.say(f"step {step}: the loss is not finite, skipped; its samples: {shown}")

    def _average(self) -> None:
        """Take the weights into the moving average, if that is due and nodes have the same ones."""
        settings, step = self.settings, self.state.step
        used = (settings.save_every, settings.eval_every, settings.sample_every)
        if any(self._due(step, every) for every in used) or step == settings.steps:
            self.engine.settle()
        # A release is no older than its run.
        self._average_owed |= step % settings.ema_every == 0 or step == settings.steps
        if self._average_owed and self.engine.settled:
            self.state.ema.update(self.engine.weights())
            self._average_owed = False

    def _after_step(self, numbers: dict[str, float], bar: tqdm) -> None:
        """Save first: a failure in a measure or an image must not cost a checkpoint."""
        settings, step = self.settings, self.state.step
        bar.update()
        self._end_epoch()
        if self._due(step, settings.log_every):
            speed = self.speed.numbers(step, self.state.progress)
            line = numbers | speed | self.engine.telemetry() | self._epoch
            line |= self.watch.compared(speed["seconds_per_step"])
            self.run.log(step, **line)
            self.watch.logged(line)
            for row in self.planned.beside(step - self._logged, speed):
                self.run.say(row)
            self._epoch, self._logged = {}, step
            bar.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
        self._owed |= self._due(step, settings.save_every)
        if self._owed and self._trusted:
            self._save()
        self._measure()

    def _end_epoch(self) -> None:
        """Say what was amiss in the samples, when an epoch of them has ended."""
        progress = self.state.progress
        before = (progress.samples - self.settings.batch_size) // progress.total
        if progress.epoch > before:
            line, self._epoch = self.amiss.summary(progress.epoch, progress.total)
            self.run.say(line)

    def _measure(self) -> None:
        step = self.state.step
        if self._due(step, self.settings.eval_every):
            self.watch.now("evaluation", step)
            measures = self.stage.validate(self.state)
            found, warning = self.stage.alarm(step, measures, self.run.lines())
            self.run.log(step, **measures, **found)
            if warning:
                self.run.say(warning)
        if self._due(step, self.settings.sample_every):
            self.watch.now("samples", step)
            for name, image in self.stage.sample(self.state).items():
                self.run.image(step, name, image)

    def _catch_up(self) -> None:
        """Measures and images of a step after whose checkpoint the run was cut off."""
        if self.state.step and not self.ranks.broadcast(self.run.measured(self.state.step)):
            self._measure()

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.settings.steps)

    def _save(self) -> None:
        self.watch.now("saving", self.state.step)
        self.state.save(self.saver)
        self.watch.saved(self.state.step)
        self._saved, self._owed = self.state.step, False
        self._sync()

    def _sync(self) -> None:
        """Upload what is new, if the run is remote; what goes wrong is raised on all ranks."""
        self.ranks.on_main(self.run.sync)

    def _restore(self, resume: str | None, new_epoch: bool) -> None:
        checkpoints = self.run.checkpoints
        found = ""
        if resume == "auto":
            found = store.newest(checkpoints, self.ranks, self.run.say)
        elif resume is not None:
            found = find_checkpoint(resume, self.ranks)
        if found:
            self.run.say(f"restored {self.state.load(found, new_epoch)}")
            if _same_folder(found.rpartition("/")[0], checkpoints):
                self._saved = self.state.step
        elif self.settings.init:
            self.run.say(self.state.start_from(self.settings.init))

    def _finish(self) -> None:
        """The release folder, from the checkpoint of this step; made anew when it is of another."""
        step = self.state.step
        checkpoint = store.step_folder(self.run.checkpoints, step)
        digest = self.ranks.on_main(lambda: write_release(self.run.folder, checkpoint))
        self._sync()
        made = f"{self.stage.title} {digest} in release/" if digest else "nothing to do"
        self.run.say(f"complete at step {step}; {made}")


def _same_folder(one: str, other: str) -> bool:
    if storage.is_remote(one) or storage.is_remote(other):
        return one == other
    return Path(one).resolve() == Path(other).resolve()
