"""The two hashes that sd-scripts and its readers (A1111, Forge) identify adapters by.

Both are of the file as the reference serialiser would write it with the metadata cut down to the
``ss_*`` keys: ``sshs_model_hash`` is SHA-256 of the tensors' bytes, ``sshs_legacy_hash`` the first
8 hex digits of SHA-256 of the 64 KiB at 1 MiB of the whole (of nothing, in smaller files).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from io import FileIO

from .header import TensorInfo, encode

# Of the length of the real ones, so that a header can be written before they are known.
PLACEHOLDERS = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
_START, _LENGTH = 0x100000, 0x10000


class Hasher:
    """Hashes of a file while it is written.

    Args:
        tensors: their layout in the file.
        metadata: of the file; keys other than ``ss_*`` do not count.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        counted = {key: value for key, value in metadata.items() if key.startswith("ss_")}
        self._head = encode(tensors, counted)
        self._model = hashlib.sha256()
        self._done = 0

    def feed(self, info: TensorInfo, data: memoryview) -> None:
        """Take a tensor's bytes; one out of turn is left to :meth:`finish`."""
        if info.start == self._done:
            self._model.update(data)
            self._done = info.end

    def finish(self, file: FileIO, base: int) -> dict[str, str]:
        """The hashes as metadata; ``file`` holds all tensors from byte ``base`` on."""
        file.seek(base + self._done)
        while chunk := file.read(1 << 20):
            self._model.update(chunk)
        window = self._head[_START : _START + _LENGTH]
        file.seek(base + max(0, _START - len(self._head)))
        window += file.read(_LENGTH - len(window))
        legacy = hashlib.sha256(window).hexdigest()[:8]
        return {"sshs_model_hash": self._model.hexdigest(), "sshs_legacy_hash": legacy}
