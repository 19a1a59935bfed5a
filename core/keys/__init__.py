"""One file per key format, found by discovery; ``resolve`` matches a file with a model."""

from __future__ import annotations

from .base import FORMATS, KeyFormat

FORMATS.discover(__name__, __path__, lambda item: item.id if isinstance(item, KeyFormat) else None)

# After discovery, which imports these modules as well.
from .convert import convert  # noqa: E402
from .describe import Description, describe  # noqa: E402
from .index import ModelIndex  # noqa: E402
from .norms import block_norms  # noqa: E402
from .report import Match, Report  # noqa: E402
from .resolve import Entry, resolve  # noqa: E402

__all__ = [
    "FORMATS", "Description", "Entry", "KeyFormat", "Match", "ModelIndex", "Report",
    "block_norms", "convert", "describe", "resolve",
]  # fmt: skip
