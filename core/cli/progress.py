"""How far a tool has come, on a terminal or in a log."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

_OFTEN, _SELDOM = 0.1, 10.0  # seconds between two looks of a person, between two lines of a log


class Progress:
    """A ``Tick`` that writes to ``stream``: one line that changes on a terminal, else rare ones."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._stream, self._quiet, self._live = stream, quiet, stream.isatty()
        self._next = time.monotonic() + (0 if self._live else _SELDOM)
        self._shown = False

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        self._next = now + (_OFTEN if self._live else _SELDOM)
        line = f"{done}/{total} {what}" if total else what
        if self._live:
            width = max(20, shutil.get_terminal_size().columns - 1)
            self._stream.write(f"\r\x1b[K{line[:width]}")
            self._shown = True
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
