"""What an adapter file is, from the file alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import cast

from ..adapters import ALGORITHMS, Algorithm
from ..errors import AdapterLabError
from ..files import Adapter
from ..lazy import AdapterFile
from . import reasons
from .base import FORMATS, guess
from .places import find_spec
from .report import title
from .scale import Scales
from .shared import read_modules
from .stems import Stem
from .trainers import trainer

_SHOWN = ("ss_", "sshs_", "modelspec.")
_HASHES = {"sshs_model_hash": "SHA-256 of the tensors", "sshs_legacy_hash": "A1111 short hash",
           "modelspec.hash_sha256": "SHA-256"}  # fmt: skip
_TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "trigger_word")
_LONGEST, _TOP = 120, 20


@dataclass
class Description:
    """Facts of one file.

    Attributes:
        modules: their number. algorithms: name -> modules. broken: stem -> why it has none.
        format, architecture: ids; None where nothing tells.
        ranks: (rank, alpha, modules), the most frequent first.
        scales: what had to be assumed of the modules' scale.
        dtypes: name -> tensors. parameters: numbers in all tensors. size: bytes of them.
        tags: (tag, images) of the training captions, the most frequent first.
    """

    name: str
    modules: int
    algorithms: dict[str, int]
    format: str | None
    architecture: str | None
    trainer: str
    ranks: list[tuple[int, float, int]]
    dtypes: dict[str, int]
    tensors: int
    parameters: int
    size: int
    broken: dict[str, str] = field(default_factory=dict[str, str])
    scales: list[str] = field(default_factory=list[str])
    embeddings: list[str] = field(default_factory=list[str])
    triggers: list[str] = field(default_factory=list[str])
    tags: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    hashes: dict[str, str] = field(default_factory=dict[str, str])
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def headline(self) -> str:
        """One line: "a.safetensors: 264 modules (264 LoRA)"."""
        named = " + ".join(f"{n} {ALGORITHMS[a].title}" for a, n in self.algorithms.items())
        what = named or "no known algorithm"
        return f"{self.name or 'adapter'}: {self.modules} modules ({what})"

    @property
    def facts(self) -> list[tuple[str, str]]:
        """(name, value) of everything known, in the order of interest."""
        form = f"{FORMATS[self.format].title} format" if self.format else "unknown key format"
        ranks = [f"rank {r} alpha {a:g} ({n} x)" for r, a, n in self.ranks[:4]]
        rows = [
            ("keys", f"{form}, for {title(self.architecture)}"),
            ("trainer", self.trainer),
            ("size", f"{self.tensors} tensors, {self.size / 2**20:.2f} MiB, "
             f"{self.parameters:,} parameters, {', '.join(self.dtypes)}"),
            ("ranks", ", ".join(ranks) + (" ..." if len(self.ranks) > 4 else "")),
            ("scale", "; ".join(self.scales)),
            ("embeddings", ", ".join(self.embeddings)),
            ("trigger words", ", ".join(self.triggers)),
            ("top tags", ", ".join(f"{tag} ({n})" for tag, n in self.tags)),
            *((_HASHES[key], value) for key, value in self.hashes.items()),
        ]  # fmt: skip
        return [(name, value) for name, value in rows if value]

    def to_text(self) -> str:
        """The headline, the facts, modules that no algorithm can take, and metadata."""
        lines = [self.headline, *(f"{name}: {value}" for name, value in self.facts)]
        if self.broken:
            stem, why = next(iter(self.broken.items()))
            lines.append(f"{len(self.broken)} modules of no supported algorithm, {stem}: {why}")
        lines += [f"  {key}: {_short(value)}" for key, value in self.metadata.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The same as JSON-able data."""
        return {"headline": self.headline, "facts": self.facts, **asdict(self)}


def describe(adapter: Adapter | AdapterFile) -> Description:
    """Modules, algorithm, ranks and alphas, key format, architecture, size and metadata.

    Of an open file only the small tensors are read.

    Raises:
        AdapterLabError: keys without a meaning, an unusable peft config.
    """
    adapter = adapter.shell() if isinstance(adapter, AdapterFile) else adapter
    everything = read_modules(adapter)
    stems = {name: stem for name, stem in everything.items() if not stem.embedding}
    form, scales = guess([stem.clean for stem in stems.values()]), Scales(adapter)
    loaded, broken = _loaded(stems, scales)
    spec = find_spec(stems.values(), adapter.metadata)
    ranks = Counter((a.rank, round(a.alpha, 4)) for a in loaded if a.parameter == "weight")
    types = Counter(str(t.dtype).removeprefix("torch.") for t in adapter.values())
    metadata = adapter.metadata
    return Description(
        name=adapter.name, modules=len(stems), broken=broken,
        algorithms=dict(Counter(algorithm.name for algorithm in loaded)),
        format=form.id if form else None, architecture=spec.id if spec else None,
        trainer=trainer(metadata, list(stems), bool(adapter.config)),
        ranks=[(rank, alpha, n) for (rank, alpha), n in ranks.most_common()],
        scales=scales.warnings, dtypes=dict(types), tensors=len(adapter),
        parameters=sum(t.numel() for t in adapter.values()),
        size=sum(t.nbytes for t in adapter.values()),
        embeddings=[name.partition(".")[2] for name in everything if name not in stems],
        triggers=[metadata[key] for key in _TRIGGERS if metadata.get(key)],
        tags=top_tags(metadata),
        hashes={key: metadata[key] for key in _HASHES if metadata.get(key)},
        metadata={k: v for k, v in sorted(metadata.items()) if k.startswith(_SHOWN)},
    )  # fmt: skip


def top_tags(metadata: Mapping[str, str], count: int = _TOP) -> list[tuple[str, int]]:
    """The most frequent tags of ``ss_tag_frequency``, summed over its datasets."""
    try:
        table: object = json.loads(metadata.get("ss_tag_frequency") or "{}")
    except ValueError:
        return []
    tags: Counter[str] = Counter()
    for counts in cast("dict[str, object]", table).values() if isinstance(table, dict) else ():
        if isinstance(counts, dict):
            found = cast("dict[str, object]", counts).items()
            tags.update({tag.strip(): n for tag, n in found if isinstance(n, int)})
    return tags.most_common(count)


def _loaded(stems: Mapping[str, Stem], scales: Scales) -> tuple[list[Algorithm], dict[str, str]]:
    """The algorithm of each module, and why others have none."""
    loaded: list[Algorithm] = []
    broken: dict[str, str] = {}
    for name, stem in stems.items():
        reason = reasons.unusable(stem)
        try:
            path = next((r.body for r in FORMATS["peft"].read(stem.clean)), stem.clean)
            parts = {} if reason else scales.load(stem, path)
        except AdapterLabError as error:
            parts, reason = {}, str(error)
        loaded += list(parts.values())[:1]
        if not parts:
            broken[name] = reason
    return loaded, broken


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…"
