"""What is said of a model file that adapters were baked into: to the user, and in the file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch

from ..adapters import ALGORITHMS
from ..hashes import PLACEHOLDERS
from ..keys import Match, Report
from .metadata import merged_from
from .model_names import Place
from .outcome import Outcome, Row, mebibytes

ADAPTERS = "adapter_lab.baked"  # JSON: [{"name", "strength"}]
QUANTISED = "adapter_lab.quantised"  # JSON: {"format", "source": {"name", "sha256"}}
# True of the file that it was, not of this one.
_STALE = ("modelspec.hash_sha256", "modelspec.date", "modelspec.thumbnail", *PLACEHOLDERS)


def metadata_of(
    metadata: Mapping[str, str], adapters: Sequence[tuple[str, float]], src: str, dst: str
) -> dict[str, str]:
    """Those of ``src`` with what is no longer true taken out, and what ``dst`` was made of.

    Args:
        adapters: (name, strength) each, in order.

    Reference: ModelSpec 1.0.1, ``title`` and ``merged_from``.
    """
    made = {key: value for key, value in metadata.items() if key not in _STALE}
    names = [os.path.basename(src), *(name for name, _ in adapters)]
    made["modelspec.title"] = os.path.basename(dst).removesuffix(".safetensors").rstrip("_")
    made["modelspec.merged_from"] = merged_from(names)
    rows = [{"name": name, "strength": strength} for name, strength in adapters]
    made[ADAPTERS] = json.dumps([*_earlier(metadata), *rows])
    return made


def _earlier(metadata: Mapping[str, str]) -> list[object]:
    """The adapters that the file has in it already."""
    try:
        found: object = json.loads(metadata.get(ADAPTERS, "[]"))
    except ValueError:
        return []
    return cast("list[object]", found) if isinstance(found, list) else []


def tell_matches(
    outcome: Outcome, report: Report, places: Mapping[str, Place], name: str, strength: float,
    *, again: bool,
) -> None:  # fmt: skip
    """Where the modules of one adapter go; those of a second one carry its name."""
    more = f" ({name})" if again else ""
    for stem, match in report.matched.items():
        title = ", ".join((ALGORITHMS[match.algorithm].title, *match.traits))
        note = _where(match, places[match.key])
        outcome.rows[f"{stem}{more}"] = Row(title, match.rank, note=note)
    outcome.left_out |= {f"{stem}{more}": why for stem, why in report.unmatched.items()}
    outcome.warnings += report.warnings
    outcome.facts.append((name, f"strength {strength:g}, {report.verdict}"))


def _where(match: Match, place: Place) -> str:
    """ "into img_attn.qkv.weight, rows 0 to 127"."""
    start = place.rows[1] if place.rows else 0
    axis, offset, length = match.slice or (0, 0, place.rows[2] if place.rows else 0)
    if not length:
        return f"into {place.key}"
    what, first = ("columns", offset) if axis else ("rows", start + offset)
    return f"into {place.key}, {what} {first} to {first + length - 1}"


def tell_whole(
    outcome: Outcome, model: str, sizes: tuple[int, int], dtypes: Iterable[torch.dtype],
    changed: int, parts: Iterable[str],
) -> None:  # fmt: skip
    """The verdict, and what is to be said of the file as a whole.

    Args:
        model: name of the file baked into. sizes: before and after, bytes.
        dtypes: of the tensors. changed: how many of them. parts: of the model, one a change.
    """
    counts = Counter(str(dtype).removeprefix("torch.") for dtype in dtypes)
    total = len(outcome.rows) + len(outcome.left_out)
    outcome.verdict = (
        f"{len(outcome.rows)} of {total} modules baked into {changed} of {counts.total()} tensors"
    )
    title = {"model": "diffusion model"}
    where = Counter(title.get(part, part) for part in parts)
    outcome.facts[:0] = [
        ("model", model),
        ("size", mebibytes(*sizes)),
        ("tensors", ", ".join(f"{count} {name}" for name, count in counts.most_common())),
        ("changes by part", ", ".join(f"{part} {count}" for part, count in where.items())),
    ]
