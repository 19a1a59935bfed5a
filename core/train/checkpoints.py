"""The files of a run: one adapter per saved step, named so that they sort and tell the step."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile

from ..atomic import TEMPORARY, telling
from ..errors import AdapterLabError
from .record import read_json

_CHECKPOINT = re.compile(r".+-step(\d{8})\.safetensors")


@dataclass(frozen=True)
class TrainRun:
    """A training run on disk.

    Attributes:
        name: of the run.
        folder: of all its files.
        shelf: folder below a registered folder of adapters, where loaders list its checkpoints;
            may be ``folder`` itself.
    """

    name: str
    folder: Path
    shelf: Path

    @property
    def state(self) -> Path:
        """The resumable state."""
        return self.folder / "state.safetensors"

    @property
    def config(self) -> Path:
        """All settings, as JSON."""
        return self.folder / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line for each step."""
        return self.folder / "metrics.jsonl"

    @property
    def previews(self) -> Path:
        """Folder of the pictures sampled while training."""
        return self.folder / "previews"

    def config_step(self) -> int:
        """The step of the last save, as the settings have it; 0 without."""
        step = read_json(self.config).get("step")
        return step if isinstance(step, int) else 0

    @property
    def lock(self) -> Path:
        """Beside the folder, which may be renamed while the lock is held."""
        return self.folder.with_name(f".{self.folder.name}.lock")

    def checkpoint(self, step: int) -> Path:
        """Adapter file of ``step``."""
        return self.folder / f"{self.name}-step{step:08}.safetensors"

    def ema(self, step: int, sigma_rel: float) -> Path:
        """Adapter file of the power-function average of width ``sigma_rel`` up to ``step``."""
        return self.folder / f"{self.name}-step{step:08}-ema{sigma_rel:.3f}.safetensors"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, file) of every checkpoint there is, by step."""
        # A run that was renamed keeps the names of its files.
        found = ((_CHECKPOINT.fullmatch(p.name), p) for p in self.folder.glob("*.safetensors"))
        return sorted((int(match[1]), path) for match, path in found if match)

    @staticmethod
    def averages(checkpoint: Path) -> list[Path]:
        """The averages saved beside ``checkpoint``, narrowest first."""
        return sorted(checkpoint.parent.glob(f"{escape(checkpoint.stem)}-ema?.???.safetensors"))

    @property
    def exists(self) -> bool:
        """Whether there is anything learned of it on disk."""
        return self.state.exists() or bool(self.checkpoints())

    def require_space(self) -> None:
        """Find out before training, not after, that nothing can be written."""
        for folder in (self.folder, self.shelf):
            with telling(f"Cannot write to '{folder}'"):
                if folder.exists() and not folder.is_dir():
                    raise AdapterLabError(
                        "it is a file, not a folder",
                        fix="Move it away, or choose another run name",
                    )
                folder.mkdir(parents=True, exist_ok=True)
                with TemporaryFile(dir=folder) as file:
                    file.write(b"adapter")

    def publish(self, step: int) -> None:
        """Put the checkpoint of ``step`` on the shelf: the same file, a copy where links fail."""
        path = self.checkpoint(step)
        shelved = self.shelf / path.name
        with telling(f"Cannot write '{shelved}'"):
            self.shelf.mkdir(parents=True, exist_ok=True)
            if shelved.exists() and shelved.samefile(path):
                return
            temporary = shelved.with_name(TEMPORARY.replace("*", f"{os.getpid()}"))
            temporary.unlink(missing_ok=True)
            try:
                os.link(path, temporary)
            except OSError:
                shutil.copy2(path, temporary)
            temporary.replace(shelved)

    def prune(self, keep: int) -> None:
        """Delete all but the last ``keep`` checkpoints with their averages; 0 keeps all.

        One that another program has open (Windows) is left to the next time.
        """
        for _, path in self.checkpoints()[:-keep] if keep else []:
            self._delete(path)

    def rewind(self, step: int) -> list[int]:
        """Before the run goes on from ``step``: delete the checkpoints of later steps, which it
        will not pass again as they were, and what a killed process left half written; put the
        checkpoint of ``step`` on the shelf. Returns the steps whose checkpoints were deleted."""
        for folder in (self.folder, self.shelf):
            for old in folder.glob(TEMPORARY):
                with suppress(OSError):
                    old.unlink()
        later = [(number, path) for number, path in self.checkpoints() if number > step]
        for _, path in later:
            self._delete(path)
        if self.checkpoint(step).exists():
            self.publish(step)
        return [number for number, _ in later]

    def _delete(self, checkpoint: Path) -> None:
        for path in (checkpoint, self.shelf / checkpoint.name, *self.averages(checkpoint)):
            with suppress(OSError):
                path.unlink()

    def retire(self) -> TrainRun | None:
        """Rename those folders of the run that hold adapters or a state to the first free
        ``name.1``, ``name.2``; None: there are none.

        The files keep their names; the shelf goes first, so that a run which could not be renamed
        whole is still found under its name.
        """
        number = 1
        while self._numbered(self.folder, number).exists() or (
            self._numbered(self.shelf, number).exists()
        ):
            number += 1
        folders = dict.fromkeys((self.shelf, self.folder))
        present = [folder for folder in folders if any(folder.glob("*.safetensors"))]
        with telling(f"Cannot rename the old run '{self.name}'"):
            for folder in present:
                folder.rename(self._numbered(folder, number))
        old = self._numbered(self.folder, number)
        return TrainRun(old.name, old, self._numbered(self.shelf, number)) if present else None

    @staticmethod
    def _numbered(folder: Path, number: int) -> Path:
        return folder.with_name(f"{folder.name}.{number}")
