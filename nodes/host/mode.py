"""How an adapter is applied: merged into the weights, or beside them on activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch.nn as nn

from ...core.adapters.padded import RESHAPE
from ...core.errors import AdapterLabError
from .layers import quantised
from .parts import Part, acts_on_layer

MERGE, BYPASS = "merge", "bypass"
MODES = ("auto", MERGE, BYPASS)


@dataclass(frozen=True)
class Mode:
    """chosen: "merge" or "bypass". why: half a sentence. merged: parameters merged even so."""

    chosen: str
    why: str
    merged: int = 0

    def to_text(self) -> str:
        """A line of the report."""
        line = f"Mode: {self.chosen}, {self.why}"
        if self.chosen == MERGE or not self.merged:
            return line
        what = "norms or other parameters" if self.merged > 1 else "norm or other parameter"
        return f"{line}; {self.merged} {what} merged even so"

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def choose(asked: str, modules: Mapping[str, nn.Module], parts: Sequence[Part]) -> Mode:
    """The mode for ``parts``, on a model with these modules by path.

    Raises:
        AdapterLabError: a strength that changes while sampling, and merging is asked for or a
            weight would change its shape.
    """
    if not parts:
        return Mode(MERGE, "with nothing to do at strength 0")
    varies = any(part.varies for part in parts)
    growing = [part.path for part in parts if part.varies and RESHAPE in part.algorithm.tensors]
    if growing:
        raise AdapterLabError(
            "An adapter that makes weights larger cannot follow a schedule",
            found=f"a larger weight for {', '.join(growing[:3])}",
            fix="Empty 'schedule', or give it one strength",
        )
    if asked == MERGE and varies:
        raise AdapterLabError(
            "Merged weights cannot follow a schedule",
            found="a strength that changes while sampling",
            fix="Set 'mode' to auto or bypass",
        )
    if asked == MERGE:
        return Mode(MERGE, "as asked for")
    formats = Counter[str]() if varies or asked == BYPASS else _formats(modules, parts)
    if asked == BYPASS:
        why = "as asked for"
    elif varies:
        why = "because the strength changes while sampling"
    elif formats:
        why = _why(formats, len({part.path for part in parts}))
    else:
        return Mode(MERGE, "because the weights are not quantised")
    left = (part for part in parts if not acts_on_layer(modules[part.path], part))
    return Mode(BYPASS, why, sum(not part.varies for part in left))


def _why(formats: Counter[str], total: int) -> str:
    count, name = formats.total(), formats.most_common(1)[0][0]
    if total == 1:
        return f"because its layer is quantised ({name})"
    verb = "is" if count == 1 else "are"
    return f"because {count} of its {total} layers {verb} quantised ({name})"


def _formats(modules: Mapping[str, nn.Module], parts: Iterable[Part]) -> Counter[str]:
    """How many of the parts' layers are quantised, by format."""
    paths = {part.path for part in parts}
    return Counter(form for path in paths if (form := quantised(modules[path])))
