"""Files that appear whole or not at all, and operating system errors said plainly."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from io import FileIO

from .errors import AdapterLabError

TEMPORARY = ".adapter_lab-*.tmp"  # files under way; a killed process leaves them behind
_FIXES = {
    errno.ENOSPC: "Free some space and try again.",
    errno.EDQUOT: "Free some space and try again.",
    errno.EFBIG: "The file system or a quota limits the size of a file.",
    errno.EACCES: "Check the permissions, and that no other program has the file open.",
    errno.EPERM: "Check the permissions, and that no other program has the file open.",
}


@contextmanager
def telling(subject: str) -> Generator[None, None, None]:
    """Turns ``OSError`` inside into ``AdapterLabError``, and puts ``subject`` in front of both."""
    try:
        yield
    except AdapterLabError as error:
        raise error.about(subject) from error.__cause__
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "")
        raise AdapterLabError(error.strerror or str(error), fix=fix).about(subject) from error


@contextmanager
def replacing(
    path: str | os.PathLike[str], *, size: int = 0, overwrite: bool = True
) -> Generator[FileIO, None, None]:
    """An empty, unbuffered file that takes the place of ``path`` when the block ends well.

    Until then it lies beside the target under a temporary name; if the block raises anything, it
    is removed and the target stays as it was. Readers see the old file or the new one. Parent
    folders are created; a symbolic link stays one, its target is replaced.

    Args:
        size: bytes that will be written, if known: a disk too full for them is found at once.
        overwrite: False refuses when ``path`` exists, before and after the block.

    Raises:
        AdapterLabError: naming ``path``: disk full, no permission, a folder, exists already.
    """
    subject = f"Cannot write '{os.fspath(path)}'"
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, TEMPORARY.replace("*", secrets.token_hex(8)))
    try:
        with telling(subject):
            _refuse(target, overwrite)
            os.makedirs(folder, exist_ok=True)
            _check_space(folder, size)
            file = FileIO(temporary, "x+")  # a buffer would be flushed, and fail, when closing
        with file:
            yield file
            with telling(subject):
                os.fsync(file.fileno())
        with telling(subject):
            _refuse(target, overwrite)
            os.replace(temporary, target)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of ``data`` at the position of ``file``; the system may take it in parts."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _refuse(target: str, overwrite: bool) -> None:
    if os.path.isdir(target):
        raise AdapterLabError("it is a folder")
    if not overwrite and os.path.exists(target):
        raise AdapterLabError("it exists already", fix="Choose another name.")


def _check_space(folder: str, size: int) -> None:
    disk = shutil.disk_usage(folder)
    if disk.total and size > disk.free:  # some network file systems report 0 of 0
        found, expected = f"{disk.free / 1e6:.1f} MB free", f"{size / 1e6:.1f} MB"
        fix = _FIXES[errno.ENOSPC]
        raise AdapterLabError("the disk is full", found=found, expected=expected, fix=fix)
