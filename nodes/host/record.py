"""What is told of a run while it goes on: on the node, on disk and on dashboards."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from ...core.train.loop import Step
from ...core.train.progress import Progress
from ...core.train.record import Metrics, read_json, read_metrics, write_json
from .job import RECENT, Job, mean
from .progress import Bar
from .trackers import Tracker

_SHOWN = 200  # held-out losses in an event, at least where there are more
_DIGITS = 5  # of a noise level on disk, where a step has hundreds of them


class Record:
    """The record of one execution of a job.

    Attributes:
        notes: sentences for the report.
        per_step: seconds, of the last steps.
    """

    def __init__(self, job: Job, node_id: str | None) -> None:
        self.job, self.notes = job, list[str]()
        self.bar = Bar(job.config.steps, node_id)
        self.metrics = Metrics(job.run.metrics)
        self.tracker = Tracker(job.trackers, job.run)
        self.rates: list[float] = []
        # Now: a model that is loaded for training is not to be read.
        self._settings = job.settings()
        self._history: list[Any] = []
        self._points: list[tuple[int, float, float]] = []
        self._seconds: list[float] = []
        self._started = time.time()

    def resume(self, progress: Progress) -> None:
        """Take the record up as it is on disk; of a run that begins anew nothing."""
        self.start, self.progress = progress.step, progress
        if progress.step == 0:
            return
        before = read_json(self.job.run.config)
        history, started = before.get("history"), before.get("started_at")
        self._history = list(history) if isinstance(history, list) else []
        self._started = float(started) if isinstance(started, (int, float)) else self._started
        rows = [row for row in read_metrics(self.metrics.path) if row["step"] <= progress.step]
        self.rates = [float(row["rate"] or 0.0) for row in rows if "rate" in row]

    def begin(self, changed: Mapping[str, tuple[Any, Any]]) -> None:
        """Training begins, or goes on with the settings that ``changed``."""
        changes = {key: {"before": old, "now": new} for key, (old, new) in changed.items()}
        self._history.append({"step": self.start, "time": _now(), "changed": changes})
        self.metrics.cut(self.start or -1)  # of a run that begins anew, nothing stays
        self.tracker.start(self._settings)
        self.write_config()

    def finish(self) -> None:
        """Training ended, however it did."""
        self.tracker.finish()

    def write_config(self) -> None:
        """``config.json`` as of now."""
        write_json(
            self.job.run.config,
            {
                "name": self.job.run.name,
                "step": self.progress.step,
                "started": _now(self._started),
                "started_at": self._started,
                "saved": _now(),
                "settings": self._settings,
                "history": self._history,
                "notes": self.notes,
            },
        )

    def wrote(self, step: Step) -> None:
        """Write down that a step is done."""
        self._seconds.append(step.seconds)
        self.rates.append(step.rate)
        row = {"step": step.step, "loss": step.loss, "rate": step.rate, "norm": step.norm}
        levels = [round(t, _DIGITS) for t in step.t]
        self.metrics.add({**row, "t": levels, "seconds": step.seconds, "memory": self._memory()})
        self.tracker.log({f"train/{k}": v for k, v in row.items() if k != "step"}, step.step)
        self._points.append((step.step, step.loss, self._smooth()))

    def show(self, step: Step, last: bool) -> None:
        """Show it, the ``last`` one in any case; raises when the user cancelled."""
        text = self._line(step)
        if self.bar.may_send() or last:
            self._send(step, text)
        self.bar.update(step.step, text)

    def validated(self, step: int, loss: float) -> None:
        """A held-out loss was measured."""
        self.metrics.add({"step": step, "validation": loss})
        self.tracker.log({"validation/loss": loss}, step)

    def previewed(self, step: int, images: list[dict[str, str]]) -> None:
        """Pictures were sampled."""
        if images:
            self.bar.send("preview", {"step": step, "images": images})

    @property
    def per_step(self) -> float:
        """Mean seconds of the last steps of this execution."""
        return mean(self._seconds[-RECENT:]) if self._seconds else 0.0

    @property
    def started(self) -> float:
        """When the run began, Unix time."""
        return self._started

    def _smooth(self) -> float:
        return mean(self.progress.losses[-RECENT:])

    def _send(self, step: Step, text: str) -> None:
        self.bar.send(
            "training",
            {
                "step": step.step,
                "steps": self.job.config.steps,
                "start": self.start,
                "loss": _number(step.loss),
                "smooth": _number(self._smooth()),
                "rate": step.rate,
                "norm": _number(step.norm),
                "per_second": 1 / max(self.per_step, 1e-9),
                "left": self._left(step),
                "memory": self._memory(),
                "points": [[n, _number(a), _number(b)] for n, a, b in self._points],
                "validation": [[n, _number(loss)] for n, loss in self._held_out()],
                "text": text,
            },
        )
        self._points.clear()

    def _held_out(self) -> list[tuple[int, float]]:
        """Held-out losses, evenly thinned where they are many; the last one stays."""
        found = self.progress.validation
        return found[:: -max(1, len(found) // _SHOWN)][::-1]

    def _left(self, step: Step) -> float:
        return self.per_step * (self.job.config.steps - step.step)

    def _line(self, step: Step) -> str:
        """The state of the run in one line."""
        held_out = self.progress.validation
        more = f" · held-out {held_out[-1][1]:.4f}" if held_out else ""
        left = int(self._left(step))
        return (
            f"step {step.step} of {self.job.config.steps} · loss {self._smooth():.4f}{more} · "
            f"{self.per_step:.2f} s/step · {left // 60}:{left % 60:02} left"
        )

    def _memory(self) -> int:
        """Bytes: the peak on the device since the run began, of a CPU the process's own."""
        device = self.job.model.load_device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return psutil.Process().memory_info().rss


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _now(at: float | None = None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
