"""Saving a run: its checkpoint, averages and state, and what to do where that fails."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ...core.adapters import AdapterConfig, Algorithm
from ...core.archs import ArchSpec
from ...core.atomic import telling
from ...core.errors import AdapterLabError
from ...core.files import Adapter, write_adapter
from ...core.train import snapshot
from ...core.train.checkpoints import TrainRun
from ...core.train.ema import Tracker
from ...core.train.optim import Optimizer
from ...core.train.progress import Progress
from ...core.train.targets import file_stem
from .described import metadata
from .job import Job
from .record import Record


class Keeper:
    """Writes what is learned of ``job``.

    Attributes:
        saved_at: the step of which the state is on disk.
        identity: what the factors and moments depend on.
        averages: the running averages of the factors, None where none are kept.
    """

    def __init__(
        self,
        job: Job,
        arch: ArchSpec | None,
        adapters: Mapping[str, Algorithm],
        optimizer: Optimizer,
        averages: Tracker | None,
        record: Record,
    ) -> None:
        self.job, self.arch, self.adapters = job, arch, adapters
        self.optimizer, self.averages, self.record = optimizer, averages, record
        self.progress, self.saved_at = Progress(), 0
        self._unlisted = False
        self.circumstances = job.circumstances()
        self.identity: dict[str, Any] = {
            "architecture": arch.id if arch else None,
            "algorithm": (job.adapter or AdapterConfig()).algorithm if not job.init_from else None,
            "optimizer": job.optimizer.optimizer,
            "module": {
                name: [a.name, a.scale, *(list(t.shape) for t in a.tensors.values())]
                for name, a in adapters.items()
            },
        }

    def restore(self) -> None:
        """Take factors, moments, averages and progress from the run's state."""
        self.progress, _ = snapshot.load(
            self.job.run.state, self.adapters, self.optimizer, self.identity, self.circumstances,
            self.averages,
        )  # fmt: skip
        self.saved_at = self.progress.step

    def save(self) -> None:
        """Write everything, each file whole or not at all.

        Raises:
            AdapterLabError: something could not be written. Says what, and where the state that
                is in memory was put instead.
        """
        self._require_finite()
        run, failures = self.job.run, list[AdapterLabError]()
        # Lines before the state: what a resumed run goes on from is never ahead of them. The state
        # after the checkpoint: a checkpoint that is missing is never behind it.
        works = (
            self.record.metrics.sync,
            lambda: self._write(run),
            self.publish,
            self.record.write_config,
        )
        for work in works:
            try:
                work()
            except AdapterLabError as error:
                failures.append(error)
        if failures:
            raise self._told(failures[0]) from failures[0]
        run.prune(self.job.config.keep_last)

    def save_diverged(self) -> None:
        """What is left when the loss is no number.

        The state of an earlier save stays, since the run could only diverge again from the one of
        now; without an earlier one, it is saved.
        """
        step, run = self.progress.step, self.job.run
        if step <= self.saved_at or not self._is_finite():
            return
        if self.saved_at:
            write_adapter(run.checkpoint(step), self.adapter())
            self.publish()
            self.record.metrics.sync()
        else:
            self.save()

    def publish(self) -> None:
        """Put the checkpoint of now on the shelf; what is in the way there is a note, once, since
        nothing is lost by it."""
        try:
            self.job.run.publish(self.progress.step)
        except AdapterLabError as error:
            if not self._unlisted:
                self.record.notes.append(
                    f"loaders do not list the adapter files, which are in '{self.job.run.folder}': "
                    f"{error}"
                )
            self._unlisted = True

    def adapter(self) -> Adapter:
        """The adapter as it is meant to be used now, on the CPU, in ComfyUI's spelling."""
        with self.optimizer.evaluated():
            return self._adapter(self.adapters)

    def last_good(self) -> str:
        """A sentence that names the newest checkpoint, "" without one."""
        found = self.job.run.checkpoints()
        return f"The last good adapter is '{found[-1][1].name}'" if found else ""

    def _write(self, run: TrainRun) -> None:
        step = self.progress.step
        write_adapter(run.checkpoint(step), self.adapter())
        for sigma_rel, averaged in self._averaged():
            write_adapter(run.ema(step, sigma_rel), averaged)
        snapshot.save(
            run.state, self.adapters, self.optimizer, self.progress, self.identity,
            self.circumstances, self.averages,
        )  # fmt: skip
        if run is self.job.run:
            self.saved_at = step

    def _averaged(self) -> Iterator[tuple[float, Adapter]]:
        """Width and adapter of each average, one at a time: they may be as large as the model."""
        for sigma_rel, factors in self.averages.states.items() if self.averages else ():
            by_id = {id(t): mean for t, mean in zip(self.optimizer.factors, factors, strict=True)}
            means = {
                name: a.on({s: by_id.get(id(t), t) for s, t in a.tensors.items()})
                for name, a in self.adapters.items()
            }
            adapter = self._adapter(means)
            adapter.metadata["adapter_lab_ema_sigma_rel"] = str(sigma_rel)
            yield sigma_rel, adapter

    def _adapter(self, adapters: Mapping[str, Algorithm]) -> Adapter:
        tensors: dict[str, Tensor] = {
            f"{file_stem(name)}.{suffix}": tensor.detach().to("cpu", copy=True).contiguous()
            for name, algorithm in adapters.items()
            for suffix, tensor in algorithm.state().items()
        }
        described = metadata(self.job, self.arch, adapters, self.progress, self.record.started)
        return Adapter(tensors, described, name=self.job.run.name)

    def _require_finite(self) -> None:
        if not self._is_finite():
            raise AdapterLabError(
                f"Training diverged: the factors after step {self.progress.step} are no numbers, "
                "and are not saved",
                fix=f"Lower the learning rate. {self.last_good()}".strip(),
            )

    @torch.no_grad()
    def _is_finite(self) -> bool:
        return all(
            bool(torch.isfinite(t).all())
            for algorithm in self.adapters.values()
            for t in algorithm.tensors.values()
        )

    def _told(self, error: AdapterLabError) -> AdapterLabError:
        """The failure of a save, with what is left and where."""
        step, run = self.progress.step, self.job.run
        kept = [self.last_good()]
        if self.saved_at != step:
            place = self._rescued()
            if place:
                kept = [f"What was learned is in '{place}': move its files into '{run.folder}' "
                        "before you queue again"]  # fmt: skip
            elif run.state.exists():
                kept.append("The state of an earlier step is untouched")
        advice = ". ".join(filter(None, (error.fix.rstrip("."), *kept)))
        return AdapterLabError(
            f"Step {step} of the run '{run.name}' could not be saved completely: {error.failed}",
            found=error.found, expected=error.expected, fix=advice,
        )  # fmt: skip

    def _rescued(self) -> Path | None:
        """Write checkpoint and state somewhere else; the folder, None where nothing takes them."""
        name = f"{self.job.run.name}-step{self.progress.step:08}"
        for root in _shelters():
            folder = root / "adapter_lab" / "rescued" / name
            run = TrainRun(self.job.run.name, folder, folder)
            if _succeeds(partial(self._write, run)):
                return folder
        return None


def _shelters() -> tuple[Path, ...]:
    """Where else things can be kept: often on other disks."""
    return Path(folder_paths.get_user_directory()), Path(tempfile.gettempdir())


def _succeeds(work: Callable[[], object]) -> bool:
    try:
        with telling("not here"):
            work()
    except AdapterLabError:
        return False
    return True
