"""Folders that are complete or absent, and pip with one clear line when it fails.

The ground under `comfyui.py`: standard library only, since it runs before anything is installed.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

GB = 10**9
NEEDED_GB = 10
MARKER = ".complete"
# What pip writes when it fails, and what that means. `{found}` is pip's own last error.
CAUSES = (
    (r"No space left on device|Errno 28", "the disk is full; free about 10 GB, or set "
     "ADAPTER_LAB_CACHE to a folder on a larger disk, and run it again"),
    (r"DO NOT MATCH THE HASHES", "the archive is not the one this pack was made for ({found}); "
     "check the package index or mirror that pip is set to use, and run it again"),
    (r"connection broken by|ConnectionError|ConnectTimeout|ReadTimeout|Could not fetch URL|"
     r"name resolution|ProxyError", "the package index can't be reached ({found}); check the "
     "network, proxy and `pip config list`, and run it again"),
)


class Failure(Exception):
    """What failed; what was found; what was expected; what to do next. One line."""


def say(text: str) -> None:
    """Progress goes to stderr: stdout is for the answer."""
    sys.stderr.write(f"adapter-lab: {text}\n")
    sys.stderr.flush()


def cache() -> Path:
    moved = os.environ.get("ADAPTER_LAB_CACHE")
    return Path(moved).expanduser().absolute() if moved else Path.home() / ".cache" / "adapter-lab"


def key(*parts: object) -> str:
    """A short name for everything that went in."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def python_in(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        if not _try_lock(file.fileno()):
            say(f"another run is preparing {path.stem}; waiting for it")
            while not _try_lock(file.fileno()):
                time.sleep(0.2)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def built(folder: Path, build: Callable[[Path], None], gigabytes: float = 0) -> Path:
    """`folder`, made by `build(folder)` unless an earlier run has finished it.

    Environments can't be moved once made, so they are built in place; the marker is written last,
    and a folder without it is a leftover that nobody uses.
    """
    marker = folder / MARKER
    if marker.exists():
        return folder
    with locked(folder.with_name(folder.name + ".lock")):
        if marker.exists():
            return folder
        if folder.exists():
            say(f"removing {folder.name}, which an interrupted run left unfinished")
            shutil.rmtree(folder)
        _need_space(folder.parent, gigabytes)
        try:
            folder.mkdir()
            build(folder)
            marker.touch()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def _need_space(folder: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(folder).free / GB
    if free < gigabytes:
        raise Failure(f"Not enough disk space in {folder}: {free:.1f} GB free, {gigabytes:.0f} GB "
                      "needed. Free some, or set ADAPTER_LAB_CACHE to a folder on a larger disk.")


def venv(python: Path, folder: Path, *options: str) -> Path:
    """A virtual environment of `python` in `folder`; returns its Python."""
    command = [str(python), "-I", "-m", "venv", *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr + done.stdout).strip() or "no message"
        line = said.splitlines()[-1 if said.startswith("Traceback") else 0]
        raise Failure(f"{python} can't make a virtual environment: {line}. Install its venv module "
                      "(Debian: apt-get install python3-venv) and run it again.")
    return python_in(folder)


def pip(python: Path, *arguments: str, step: str, work: Path, gigabytes: float = 0) -> None:
    """Run pip in `python`, saying how far it is; `work` holds its temporary files."""
    work.mkdir(exist_ok=True)
    # No cache of pip's own: ours is kept, and two copies would not fit into the space asked for.
    options = ["--no-cache-dir", "--disable-pip-version-check", "--retries=2", "--timeout=30"]
    command = [str(python), "-I", "-m", "pip", arguments[0], *options, *arguments[1:]]
    folders = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    environment = {**os.environ, **folders, "PIP_USER": "0", "PIP_PROGRESS_BAR": "off"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT, errors="replace")
    try:
        log = _watch(process, step, work, gigabytes)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    if process.returncode:
        raise Failure(f"{step} failed: {_cause(log)}")


def _watch(process: subprocess.Popen[str], step: str, work: Path, gigabytes: float) -> list[str]:
    """Follow pip until it ends; returns its last lines."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    log: collections.deque[str] = collections.deque(maxlen=400)
    start, free, doing = time.monotonic(), shutil.disk_usage(work).free, "starting"
    tty, due = sys.stderr.isatty(), 0.0
    while True:
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=0.5)
            if line is None:
                break
            log.append(line)
            if re.match(r"\s*(Collecting|Downloading|Building|Installing) ", line):
                doing = line.strip()
        if time.monotonic() >= due:
            due = time.monotonic() + (0.5 if tty else 10)
            written = max(0, free - shutil.disk_usage(work).free) / GB
            far = f", {written:.1f} of about {gigabytes:.1f} GB written" if gigabytes else ""
            text = f"{step}: {time.monotonic() - start:.0f} s{far}: {doing}"[:110]
            sys.stderr.write(f"\r{text:110}" if tty else f"adapter-lab: {text}\n")
            sys.stderr.flush()
    if tty:
        sys.stderr.write("\r" + " " * 110 + "\r")
    return list(log)


def _cause(log: list[str]) -> str:
    text = "\n".join(log)
    errors = [line.strip() for line in log if line.lstrip().startswith(("ERROR:", "Got "))]
    found = re.sub(r"\s+", " ", errors[-1] if errors else (log or ["pip said nothing"])[-1])
    for pattern, meaning in CAUSES:
        if re.search(pattern, text):
            return meaning.format(found=found[:200])
    return f"{found[:300]}; see `pip config list` for the index in use, and run it again"


def run(main: Callable[[], int]) -> int:
    """`main()`, with every expected failure as one line on stderr and a non-zero exit code."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        return main()
    except Failure as failure:
        say(str(failure))
    except KeyboardInterrupt:
        say("interrupted; nothing half-built was kept")
        return 130
    except OSError as error:
        say(f"{error.filename or 'The cache'}: {error.strerror or error}. Repair it, or set "
            f"ADAPTER_LAB_CACHE (now {cache()}) to another folder.")
    return 1
