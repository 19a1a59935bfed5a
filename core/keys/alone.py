"""The modules of a file as entries, without a model to match them with."""

from __future__ import annotations

from ..archs import ArchSpec
from ..errors import AdapterLabError
from ..files import Adapter
from .base import FORMATS
from .places import find_spec, locate
from .resolve import Entry
from .scale import Scales
from .shared import read_modules

_OWN = "comfyui"  # the format whose names are a model's own


def file_entries(adapter: Adapter) -> tuple[list[Entry], ArchSpec | None]:
    """What each module does, at the path that its architecture calls it by, and that architecture.

    ``key`` is that path, for there is no index. Broken and unknown modules are left out.

    Raises:
        AdapterLabError: keys without a meaning, an unusable peft config.
    """
    stems = [stem for stem in read_modules(adapter).values() if not stem.embedding]
    spec, scales = find_spec(stems, adapter.metadata), Scales(adapter)
    entries: list[Entry] = []
    for stem in stems:
        place = locate(stem, FORMATS[_OWN], spec)
        path, part = (place.own_path, place.part) if place else (stem.clean, "model")
        try:
            parts = {} if stem.foreign else scales.load(stem, path)
        except AdapterLabError:
            continue
        entries += (Entry(stem.name, path, None, a, path, part) for a in list(parts.values())[:1])
    return entries, spec
