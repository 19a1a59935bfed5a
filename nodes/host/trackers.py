"""Other people's dashboards, fed through accelerate where they are installed and asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from ...core.errors import AdapterLabError
from ...core.train.checkpoints import TrainRun
from ...core.train.record import flat

TRACKERS = ("none", "tensorboard", "wandb")
_PROJECT = "adapter-lab"


class Tracker:
    """One of ``TRACKERS``, over one run.

    Raises:
        AdapterLabError: no such tracker, or its package or accelerate is not installed.
    """

    def __init__(self, name: str, run: TrainRun) -> None:
        if name not in TRACKERS:
            raise AdapterLabError(f"There is no tracker '{name}'", expected=", ".join(TRACKERS))
        self.name, self.run, self.tracker = name, run, None
        for package in () if name == "none" else ("accelerate", name):
            if importlib.util.find_spec(package) is None:
                raise AdapterLabError(
                    f"The tracker {name} cannot be used",
                    found=f"no package '{package}'",
                    fix=f"pip install {package}, or set 'trackers' to none",
                )

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin, or go on with, the record of the run."""
        if self.name == "none":
            return
        from accelerate.state import PartialState

        try:
            # What the trackers log through asks for it; it knows which process is the first.
            PartialState()
            self.tracker = self._made()
            self.tracker.start()
        except (ImportError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
            self.tracker = None
            raise AdapterLabError(
                f"The tracker {self.name} does not start",
                found=str(error),
                fix="Set 'trackers' to none to train without",
            ) from error
        if self.name == "wandb":
            self.tracker.store_init_configuration(flat(settings))

    def _made(self) -> Any:
        from accelerate import tracking

        if self.name == "tensorboard":
            return tracking.TensorBoardTracker("tensorboard", self.run.folder)
        return tracking.WandBTracker(
            _PROJECT, name=self.run.name, dir=str(self.run.folder), resume="allow",
            id="".join(c if c.isalnum() and c.isascii() else "-" for c in self.run.name),
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        if self.tracker is not None:
            self.tracker.log(dict(values), step=step)

    def finish(self) -> None:
        """Write what is left; nothing may be logged afterwards."""
        if self.tracker is not None:
            self.tracker.finish()
            self.tracker = None
