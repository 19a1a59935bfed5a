"""The hash of a file, taken while something else reads it."""

from __future__ import annotations

import hashlib
from io import FileIO
from threading import Condition, Thread

from ..atomic import telling
from ..errors import AdapterLabError
from ..streams import Reader, stamp

_CHUNK = 1 << 20


class FileHash:
    """SHA-256 of an open file, from when the block is entered on; leaving it gives up.

    It follows the other reader, a tensor behind, so that the bytes come from memory and not from
    the disk once more.

    Raises:
        AdapterLabError: the file can't be read, or is no longer the one that ``reader`` has open.
    """

    placeholder = "0" * 64  # of the length of a result

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._stamp = reader.stamp
        self._free = Condition()
        self._end: float = 0
        self._hash = hashlib.sha256()
        self._failed: OSError | None = None
        self._thread = Thread(target=self._read, daemon=True)
        with telling(f"Cannot read '{reader.path}'"):
            self._file = FileIO(reader.path)

    def __enter__(self) -> FileHash:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.follow(-1)
        self._thread.join()
        self._file.close()

    def follow(self, end: float) -> None:
        """Go as far as ``end``, in bytes of the file; below 0: give up."""
        with self._free:
            self._end = end
            self._free.notify()

    def hex(self) -> str:
        """Waits for the result."""
        self.follow(float("inf"))
        self._thread.join()
        with telling(f"Cannot read '{self._reader.path}'"):
            if self._failed:
                raise self._failed
            if not self._stamp == self._reader.stamp == stamp(self._file):
                raise AdapterLabError("the file was changed while it was read", fix="Try again.")
        return self._hash.hexdigest()

    def _read(self) -> None:
        done = 0
        try:
            while self._may_go(done) and (chunk := self._file.read(_CHUNK)):
                self._hash.update(chunk)
                done += len(chunk)
        except OSError as error:
            self._failed = error

    def _may_go(self, done: int) -> bool:
        """Waits until the bytes after ``done`` were read by the other; False to give up."""
        with self._free:
            self._free.wait_for(lambda: self._end < 0 or done < self._end)
            return self._end >= 0
