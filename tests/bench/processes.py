"""Work in a process of its own: its time, and the private memory it takes at its peak."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

_CHILD = Path(__file__).with_name("child.py")
_INTERVAL = 0.001  # seconds between two looks at the memory


class Missing(Exception):
    """A peer that is not there."""


class Child:
    """A process with the functions of ``module``, started at the first call and then kept.

    Private memory is anonymous memory (RssAnon of /proc/PID/status): pages of files, which the
    system may drop, are not in it. It is looked at every millisecond from outside; the figure is
    the highest beside what the process held before the call.
    """

    def __init__(self, module: str, *paths: Path) -> None:
        self.module, self.paths = module, [str(path) for path in paths]
        self._process: subprocess.Popen[bytes] | None = None

    def seconds(self, function: str, **arguments: Any) -> float:
        """Wall time of a call, by the clock of the process."""
        return self._call(function, arguments)["seconds"]

    def peak(self, function: str, **arguments: Any) -> float:
        """MiB of private memory that a call takes."""
        self.start()
        before = highest = self._private()
        answer = self._send(function, arguments)
        while not select.select([answer], [], [], _INTERVAL)[0]:
            highest = max(highest, self._private())
        self._receive()
        return (highest - before) / 2**20

    def start(self) -> None:
        """Start the process and wait until it is ready; raises :class:`Missing` where a checkout
        lacks something."""
        if self._process is not None:
            return
        paths = [*self.paths, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, str(_CHILD), self.module]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
        )  # fmt: skip
        atexit.register(self.stop)
        reply = json.loads(self._process.stdout.readline())
        if "error" in reply:
            self.stop()
            what = f"{self.module} does not start: {reply['error']}"
            raise Missing(what) if self.paths else RuntimeError(what)

    def stop(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _call(self, function: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.start()
        self._send(function, arguments)
        return self._receive()

    def _send(self, function: str, arguments: dict[str, Any]) -> Any:
        assert self._process and self._process.stdin
        self._process.stdin.write(json.dumps([function, arguments]).encode() + b"\n")
        self._process.stdin.flush()
        return self._process.stdout

    def _receive(self) -> dict[str, Any]:
        assert self._process and self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.module} failed: run again with BENCH_VERBOSE=1")
        return json.loads(line)

    def _private(self) -> int:
        assert self._process
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return 1024 * next(int(s.split()[1]) for s in lines if s.startswith("RssAnon"))
