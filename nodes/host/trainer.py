"""A training job on a ComfyUI model: from its settings to files that load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import comfy.model_management
import torch

from ...core.errors import AdapterLabError
from ...core.train.ema import Tracker
from ...core.train.lock import locked
from ...core.train.loop import Diverged, Step, train, validate
from ...core.train.objective import Objective
from ...core.train.optim import Optimizer
from ...core.train.snapshot import OtherRun
from . import effects, paths, resume, start
from . import model as host
from .advice import out_of_memory
from .job import Job, Result, require_unchanged, text, told
from .keep import Keeper
from .memory import is_out_of_memory
from .preview import Previews
from .process import HostProcess
from .record import Record
from .session import Session
from .text import TextEncoder, is_trained, require_captions, static


class Trainer:
    """One job in execution."""

    def __init__(self, job: Job, node_id: str | None = None) -> None:
        self.job, self.arch = job, host.architecture(job.model)
        self.record = Record(job, node_id)
        self.previews = job.preview and Previews(job.preview, job.run, paths.output())

    @torch.inference_mode(False)
    def run(self) -> Result:
        """Train, or resume, to the last step or to that of the chunk.

        Whatever ends it early (cancel, an error, no memory), the state after the last completed
        step is on disk before the exception goes on.
        """
        with locked(self.job.run.lock, f"The run '{self.job.run.name}'"):
            self._require_existing()
            self._begin()
            if self.progress.step < self.job.config.steps:
                self._train()
                # Only now nothing of the model is held here any more.
                comfy.model_management.soft_empty_cache()
            return self._result()

    def _begin(self) -> None:
        """Adapters, optimizer and averages as of the state, if there is one."""
        job = self.job
        self.resumes = job.on_existing != "restart" and job.run.state.exists()
        self.changed = resume.changed(job) if self.resumes else {}
        made = start.adapters(job, self.arch, self.record.notes)
        if is_trained(made):
            self.job = job = job.with_clip(static(job.clip))
            require_captions(job.dataset)
            if job.validation is not None:
                require_captions(job.validation, "validation set")
        if not self.resumes:
            made = start.started(made, job, job.session())
        adapters = start.as_leaves(made, job)
        optimizer = Optimizer(adapters, job.optimizer, job.config.seed)
        averages = Tracker(optimizer.factors) if job.ema_tracking else None
        self.keeper = Keeper(job, self.arch, adapters, optimizer, averages, self.record)
        if self.resumes:
            try:
                self.keeper.restore()
            except OtherRun as error:
                modules = self.keeper.identity["module"]
                raise resume.explained(job, error, self.changed, modules) from error
        self.progress, self.start = self.keeper.progress, self.keeper.progress.step
        chunk = self.start + job.chunk if job.chunk else job.config.steps
        self.last = min(chunk, job.config.steps)
        self.record.resume(self.progress)
        self.record.notes += [*job.optimizer.notes(), *effects.idle(job, made)]
        if self.start >= job.config.steps:
            require_unchanged(job, self.changed, self.start)
        elif self.changed:
            self.record.notes.append(f"resumed with {told(self.changed)}")
        if self.start > job.config.steps:
            self.record.notes.append(
                f"the run has more steps than the {job.config.steps} asked for"
            )
        if self.previews and self.resumes:
            self.previews.known(self.start)

    def _train(self) -> None:
        keeper = self.keeper
        try:
            with self._process() as process:
                self._prepare(process)
                train(
                    process, keeper.adapters, self.job.dataset, self.job.config, self.objective,
                    keeper.optimizer, self.progress, self._on_step, keeper.averages,
                    self.last,
                )  # fmt: skip
        except BaseException as error:  # ComfyUI cancels with one
            explained = self._left(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            self.record.finish()

    @contextmanager
    def _process(self) -> Iterator[HostProcess]:
        job, adapters = self.job, self.keeper.adapters
        trains_text = is_trained(adapters)
        self.objective = Objective(job.objective)
        with ExitStack() as stack:
            clip = job.clip if trains_text else None
            # Loading a model patches it in place, which inference tensors allow only there.
            stack.enter_context(torch.inference_mode())
            self.session = stack.enter_context(Session(job.model, adapters, job.session(), clip))
            self.encoder = TextEncoder(clip, self.session) if trains_text else None
            if self.encoder is not None:
                stack.enter_context(self.encoder)
            encode = self.encoder.encode if self.encoder is not None else None
            yield HostProcess(self.session, job.objective.guidance, encode)

    def _prepare(self, process: HostProcess) -> None:
        """Everything before the first step; what is there is touched only once all is right."""
        job, self.process = self.job, process
        self.objective.require(process.noise)
        process.check(job.dataset)
        if job.validation is not None:
            process.check(job.validation, "validation set")
        job.run.require_space()
        # A run that begins anew keeps what is there, as its shelf where its folder was deleted.
        old = None if self.resumes else job.run.retire()
        if old is not None:
            self.record.notes.append(f"the old run is kept as '{old.name}'")
        later = ", ".join(map(str, job.run.rewind(self.start)))
        if later:
            self.record.notes.append(f"deleted adapter files of steps to be trained anew: {later}")
        self.record.begin(self.changed)
        if not self.progress.validation:
            self.record.bar.say("measuring the loss before training" if job.validation else "")
            self._validate()
        if self.start == 0:
            self._preview()

    def _on_step(self, step: Step) -> None:
        job, last = self.job, step.step >= self.last
        if step.idle:
            shown = ", ".join(step.idle[:3]) + (" ..." if len(step.idle) > 3 else "")
            self.record.notes.append(
                f"the first step taught {len(step.idle)} modules nothing: {shown}"
            )
        saves = job.config.saves_at(step.step)
        self.record.wrote(step)
        if saves:
            self._validate()
        if saves or last:
            self.keeper.save()
        self._preview()
        self.record.show(step, last=last)

    def _validate(self) -> None:
        if self.job.validation is not None:
            with self.keeper.optimizer.evaluated():
                loss = validate(
                    self.process, self.job.validation, self.objective, self.job.config.seed
                )
            self.progress.validation.append((self.progress.step, loss))
            self.record.validated(self.progress.step, loss)

    def _preview(self) -> None:
        step = self.progress.step
        if not (self.previews and self.previews.due(step)):
            return
        self.record.bar.say(f"sampling a preview after step {step}")
        untouched = step == 0 and self.job.init_from is None
        adapter = None if untouched else self.keeper.adapter()
        with ExitStack() as stack:
            if self.encoder is not None:
                self.encoder.__exit__(None, None, None)
                stack.callback(self.encoder.__enter__)
            stack.enter_context(self.session.paused())
            images = self.previews.take(self.job.model, adapter, step)
        if self.previews.failure:
            self.record.notes.append(self.previews.failure)
        self.record.previewed(step, images)

    def _left(self, error: BaseException) -> BaseException:
        """Save what is not saved after ``error``; what to raise."""
        keeper, step = self.keeper, self.progress.step
        good = keeper.last_good()
        if isinstance(error, Diverged):
            parts = [error.fix, good]
            try:
                keeper.save_diverged()
            except AdapterLabError as failure:
                parts.append(f"Besides, what was learned before could not be saved: {failure}")
            fix = ". ".join(part.rstrip(".") for part in parts if part)
            return Diverged(error.failed, found=error.found, expected=error.expected, fix=fix)
        if step > keeper.saved_at:
            keeper.save()
        if is_out_of_memory(error):
            return out_of_memory(self.job, step + 1, error)
        return error

    def _require_existing(self) -> None:
        run, choice = self.job.run, self.job.on_existing
        if not run.exists or choice == "restart":
            return
        if choice == "error":
            raise AdapterLabError(
                f"A run '{run.name}' exists already",
                fix="Choose another name, or set 'on_existing' to resume or restart",
            )
        # Killed behind its first checkpoint, before the state: it begins anew, and that is kept.
        unsaved = run.config.exists() and run.config_step() == 0
        if not run.state.exists() and not unsaved:
            raise AdapterLabError(
                f"The run '{run.name}' cannot be resumed",
                found=f"adapter files in {run.folder.name}, but no state",
                fix="Choose another name, or connect its last adapter to 'init_from'",
            )

    def _result(self) -> Result:
        job, run, progress = self.job, self.job.run, self.progress
        if not run.checkpoint(progress.step).exists():
            self.keeper.save()
        self.keeper.publish()
        adapter, record = self.keeper.adapter(), self.record
        applied = host.apply(job.model, job.clip, adapter, 1.0, 1.0, "error")
        return Result(
            adapter, progress,
            text(job, self.keeper.adapters, progress, self.start, record.per_step, record.notes),
            applied.model, applied.clip,
            previews=self.previews.shown if self.previews else (),
            rates=record.rates,
            continues=progress.step < job.config.steps,
        )  # fmt: skip
