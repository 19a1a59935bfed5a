"""One process, and in it one training, at a time on a run."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..atomic import telling
from ..errors import AdapterLabError

# Network file systems may know no locks: training without one is better than none.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)

if sys.platform == "win32":
    import msvcrt

    # A locked range can't be read by others: it lies behind what the file says.
    def _try_lock(file: int) -> None:
        os.lseek(file, 1 << 20, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
else:
    import fcntl

    def _try_lock(file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise


@contextmanager
def locked(
    path: Path, what: str, doing: str = "trained", name: str = "run name"
) -> Generator[None, None, None]:
    """Hold the lock file ``path``, which says the process that does.

    The system lets go of the lock when its process dies, however it does, so a file that was left
    behind locks nothing.

    Raises:
        AdapterLabError: another process holds it; ``what`` names what is locked, ``doing`` what
            is done to it, ``name`` what to choose otherwise.
    """
    with telling(f"Cannot write '{path}'"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file, owner = _acquire(path)
    if file is None:
        raise AdapterLabError(
            f"{what} is being {doing} already",
            found=f"process {owner}" if owner else "a process that holds its lock",
            fix=f"Wait until it ends, or choose another {name}",
        )
    try:
        with suppress(OSError):  # a full disk is found where more has to be written
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
        yield
    finally:
        # Windows unlinks no open file, others must unlink before the next one locks the same.
        if sys.platform == "win32":
            os.close(file)
        with suppress(OSError):
            path.unlink()
        if sys.platform != "win32":
            os.close(file)


def _acquire(path: Path) -> tuple[int | None, str]:
    """The locked file; None and the process that holds it, if it says so."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with ExitStack() as unless_held:
            unless_held.callback(os.close, file)
            try:
                _try_lock(file)
            except (BlockingIOError, PermissionError):
                return None, _owner(file)
            # Whoever held it may have let go and removed it just now.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), path.stat()):
                    unless_held.pop_all()
                    return file, ""


def _owner(file: int) -> str:
    with suppress(OSError):
        os.lseek(file, 0, os.SEEK_SET)
        pid = os.read(file, 32).decode(errors="replace").strip()
        return f"{pid}, this one" if pid == str(os.getpid()) else pid
    return ""
