"""The adapter files of a run: one per saved step, named so that they sort and tell the step."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from ..atomic import telling


@dataclass(frozen=True)
class TrainRun:
    """A training run on disk.

    Attributes:
        name: of the run.
        folder: of its resumable state.
        adapters: folder of its adapter files.
    """

    name: str
    folder: Path
    adapters: Path

    @property
    def state(self) -> Path:
        """The resumable state."""
        return self.folder / "state.safetensors"

    def checkpoint(self, step: int) -> Path:
        """Adapter file of ``step``."""
        return self.adapters / f"{self.name}-step{step:08}.safetensors"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, file) of every adapter file there is, by step."""
        pattern = re.compile(re.escape(self.name) + r"-step(\d{8})\.safetensors")
        found = ((pattern.fullmatch(p.name), p) for p in self.adapters.glob("*.safetensors"))
        return sorted((int(match[1]), path) for match, path in found if match)

    @property
    def exists(self) -> bool:
        """Whether there is anything of it on disk."""
        return self.state.exists() or bool(self.checkpoints())

    def require_space(self) -> None:
        """Find out before training, not after, that nothing can be written."""
        for folder in (self.folder, self.adapters):
            with telling(f"Cannot write to '{folder}'"):
                folder.mkdir(parents=True, exist_ok=True)
                with TemporaryFile(dir=folder) as file:
                    file.write(b"adapter")

    def prune(self, keep: int) -> None:
        """Delete all but the last ``keep`` adapter files; 0 keeps all.

        One that another program has open (Windows) is left to the next time.
        """
        for _, path in self.checkpoints()[:-keep] if keep else []:
            with suppress(OSError):
                path.unlink()

    def clear(self) -> None:
        """Delete state and adapter files, so that the run can start anew."""
        with telling(f"Cannot delete the old run '{self.name}'"):
            for _, path in self.checkpoints():
                path.unlink()
            self.state.unlink(missing_ok=True)
