"""What a run writes down beside its weights: a line a step, and its settings with their history."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..atomic import replacing, telling, write_all

_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
_MANY = 64  # lines that wait for a disk that refuses them, before somebody has to know


@dataclass
class Metrics:
    """``metrics.jsonl``: one JSON object a line, written line by line: of a step with a "loss", of
    a measurement on held-out items with a "validation".

    A process that is killed leaves half a line at most. A line that can't be written waits, and
    is written with the next; :meth:`sync` says so where it can't be written at all.
    """

    path: Path
    _waiting: list[str] = field(default_factory=list[str], init=False)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line. Numbers that are not finite become null."""
        self._waiting.append(json.dumps(plain(row), allow_nan=False) + "\n")
        try:
            self._write()
        except OSError:
            # The next save fails for the same reason, and says it; training is not stopped by a
            # line of text before that.
            if len(self._waiting) > _MANY:
                raise

    def sync(self) -> None:
        """All lines are on the disk when this returns; raises AdapterLabError if they can't be."""
        with telling(f"Cannot write '{self.path}'"):
            self._write(sync=True)

    def _write(self, sync: bool = False) -> None:
        if not (self._waiting or sync):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, _APPEND, 0o666)
        try:
            while self._waiting:
                data = self._waiting[0].encode()
                written = os.write(file, data)
                # A full disk takes a part of a line: the rest belongs behind it.
                self._waiting[0] = data[written:].decode()
                if not self._waiting[0]:
                    self._waiting.pop(0)
            if sync:
                os.fsync(file)
        finally:
            os.close(file)

    def cut(self, step: int) -> None:
        """Drop what is not whole and every line of a step above ``step``."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if self.path.exists() and self.path.read_bytes() != text.encode():
            with replacing(self.path, size=len(text)) as file:
                write_all(file, text.encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of ``metrics.jsonl``, each with a "step"; none without a file."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    with telling(f"Cannot read '{path}'"):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row: object = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(cast(dict[str, Any], row).get("step"), int):
                rows.append(cast(dict[str, Any], row))
    return rows


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """``value`` as JSON that people read; whole or not at all."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path, size=len(text)) as file:
        write_all(file, f"{text}\n".encode())


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote; empty where there is nothing that can be read."""
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (value before, value now) of what differs, nested keys joined by a dot.

    Compared as JSON has them, so that a tuple equals the list it was read back as.
    """
    old, new = flat(plain(before)), flat(plain(now))
    keys = [*old, *(key for key in new if key not in old)]
    return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}


def flat(table: Mapping[str, Any], prefix: str = "", join: str = ".") -> dict[str, Any]:
    """Nested tables as one, keys joined."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flat(cast(dict[str, Any], value), f"{prefix}{key}{join}", join)
        else:
            found[f"{prefix}{key}"] = value
    return found


def plain(value: Any) -> Any:
    """``value`` as JSON can say it: tuples as lists, what is not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        table = cast(Mapping[str, Any], value)
        return {str(key): plain(item) for key, item in table.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in cast(list[Any], value)]
    return value
