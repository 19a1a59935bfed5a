"""What an adapter file is, from the file alone."""

from __future__ import annotations

from collections import Counter

from ..adapters import ALGORITHMS, load
from ..files import Adapter
from .base import FORMATS
from .report import title
from .resolve import resolve
from .scale import config_scale
from .stems import Stem, read_stems

_SHOWN = ("ss_", "sshs_", "modelspec.")
_LONGEST = 120


def describe(adapter: Adapter) -> str:
    """Modules, algorithm, ranks and alphas, key format, architecture, size and metadata.

    Raises:
        AdapterLabError: a malformed module.
    """
    _, report = resolve(adapter, {})
    loaded = [load(s.tensors, _scale(adapter, s)) for s in read_stems(adapter).values()]
    modules = [algorithm for algorithm in loaded if algorithm is not None]
    ranks = Counter((m.rank, round(m.alpha, 4)) for m in modules)
    named = " + ".join(f"{n} {ALGORITHMS[a].title}" for a, n in report.algorithms.items())
    types = Counter(str(t.dtype).removeprefix("torch.") for t in adapter.values())
    size = sum(t.nbytes for t in adapter.values())
    form = f"{FORMATS[report.format].title} format" if report.format else "unknown key format"
    lines = [
        f"{adapter.name or 'adapter'}: {report.total} modules ({named or 'no known algorithm'})",
        f"{form}, for {title(report.file_architecture)}",
        f"{len(adapter)} tensors, {size / 2**20:.2f} MiB, " + ", ".join(types),
    ]
    if ranks:
        most = (f"rank {r} alpha {a:g} ({n} x)" for (r, a), n in ranks.most_common(4))
        lines.append(", ".join(most) + (" ..." if len(ranks) > 4 else ""))
    if len(modules) < len(loaded):
        lines.append(f"{len(loaded) - len(modules)} modules of no supported algorithm")
    lines += [
        f"  {key}: {value if len(value) <= _LONGEST else value[: _LONGEST - 1] + '…'}"
        for key, value in sorted(adapter.metadata.items())
        if key.startswith(_SHOWN)
    ]
    return "\n".join(lines)


def _scale(adapter: Adapter, stem: Stem) -> float | None:
    """The scale that peft's config gives a module without alpha."""
    if not adapter.config or "alpha" in stem.tensors:
        return None
    return config_scale(adapter.config, stem.clean)
