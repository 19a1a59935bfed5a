"""Why a module of a file can't be used, in words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import lru_cache

from ..adapters import ALGORITHMS, SCALAR, WRAPPERS, Algorithm, suffixes
from ..archs import wildcard
from .base import ANY_ENCODER, Parts, Reading
from .names import Names, Target
from .stems import Stem, is_known

_WHOLE = frozenset(("weight", "bias"))
_NAMED = 3  # unknown suffixes of a module before the rest is counted
_LONGEST = 40  # letters of a name that is worth a search
_ANY = (SCALAR, "alpha")  # belong to every algorithm


def unusable(stem: Stem) -> str:
    """Why no algorithm can take the tensors of ``stem`` together; "" where one can."""
    return _fault(tuple(stem.tensors), tuple(stem.unknown))


@lru_cache(1 << 10)
def _fault(names: tuple[str, ...], strange: tuple[str, ...]) -> str:
    foreign = [*(name for name in names if not is_known(name)), *strange]
    if strange and set(strange) <= set(_ANY):
        return f"{', '.join(strange)} belongs to no module"
    if foreign and not names and _WHOLE.issuperset(foreign):
        return f"{', '.join(foreign)} is a whole parameter, of a model and not of an adapter"
    if foreign:
        named = ", ".join(foreign[:_NAMED])
        named += f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        verb = "is" if len(foreign) == 1 else "are"
        near = _near(wildcard(foreign[0])[0])
        hint = f"; the nearest known tensor is {near}" if near else ""
        return f"{named} {verb} not supported{hint}"
    wrapping = [name for name in names if any(w.owns(name) for w in WRAPPERS.values())]
    rest = [name for name in names if name not in wrapping and name not in _ANY]
    owned = {name: _owners(name) for name in rest}
    factors = [name for name in rest if all(a.parameter == "weight" for a in owned[name])]
    if not rest or (wrapping and not factors):
        return f"it has no factors, only {', '.join(names)}"
    if factors and not set[type[Algorithm]].intersection(*(set(owned[n]) for n in factors)):
        titles = dict.fromkeys(owned[name][0].title for name in factors)
        return f"it mixes {' and '.join(titles)}: {', '.join(names)}"
    return ""


@lru_cache(1 << 10)
def _near(name: str) -> str | None:
    """The known suffix most like ``name``; None for what is like none at first sight."""
    head = re.split(r"[._\d]", name)[0]
    if len(name) > _LONGEST or not any(head and head in known for known in suffixes()):
        return None
    return next(iter(difflib.get_close_matches(name, suffixes(), 1, 0.75)), None)


def _owners(name: str) -> list[type[Algorithm]]:
    return [algorithm for algorithm in ALGORITHMS.values() if algorithm.owns(name)]


def unknown(names: Names, readings: list[Reading]) -> str:
    """Why nothing in the model is called as ``readings`` say, of one stem."""
    form, parts, body = readings[0]
    present = list(names.parts(parts))
    if not present:
        advice = "" if parts[0] == "model" else ": connect its clip"
        return f"for {_whose(parts)}, which is not among the given weights{advice}"
    near = names.nearest(present[0], body, form.separator)
    if near and wildcard(near)[0] == wildcard(body)[0]:
        return "the model has no block of this number"
    return "no module of this name" + (f"; the nearest is {near}" if near else "")


def _whose(parts: Parts) -> str:
    if parts[0] == "model":
        return "the diffusion model"
    return "a text encoder" if parts[0] == ANY_ENCODER else f"the text encoder {parts[0]}"


def misfit(names: Names, parts: Mapping[str, Algorithm], target: Target) -> str:
    """Why ``parts`` can't be applied to ``target``; "" where they can."""
    if target.refuse:
        return f"{target.path}: {target.refuse}"
    weight, bias = parts.get("weight"), parts.get("bias")
    if weight is None:
        found = names.index.bias(target.key)
        wrong = bias and bias.misfit(target.shape[:1]) if found else "it has no bias"
    elif target.slice and weight.whole:
        wrong = weight.whole
    else:
        wrong = weight.misfit(target.shape)
    return f"does not fit {target.path}: {wrong}" if wrong else ""
