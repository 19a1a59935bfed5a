"""peft's settings for modules whose scale is in their factors, so that alpha is the rank."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..adapters import Tensors
from ..tensors import factorization
from .dialect import BIAS, loaded

_TYPES = {"lora": "LORA", "loha": "LOHA", "lokr": "LOKR"}


class Settings:
    """Of one component of a pipeline, or of a whole file; filled module by module.

    Attributes:
        others: modules that peft can't load with the rest.
    """

    def __init__(self) -> None:
        self._ranks: dict[str, dict[str, int]] = {name: {} for name in _TYPES}
        self._names: set[str] = set()
        self._kinds: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
        self.others: list[str] = []

    def add(self, path: str, tensors: Tensors) -> None:
        """Note a module by its path in the model."""
        algorithm = loaded(tensors)
        if algorithm is None or algorithm.name not in _TYPES:
            self.others.append(path)
            return
        self._names |= {f"{algorithm.name} {name}" for name in tensors}
        rank = algorithm.rank
        if algorithm.name == "lokr":
            first, second = _sides(tensors, "lokr_w1"), _sides(tensors, "lokr_w2")
            self._kinds[path] = (first[0], second[0]), (first[1], second[1])
            # peft makes whole factors of a rank that is too large for thin ones.
            whole = not any(f"lokr_w{n}_a" in tensors for n in (1, 2))
            rank = max(second) if whole else rank
        self._ranks[algorithm.name][path] = rank

    def config(self) -> dict[str, Any] | None:
        """peft's ``adapter_config.json`` for the algorithm of most modules; None for no module.

        ``others`` grows by the modules of other algorithms, and by all where peft divides none of
        them as these LoKr are.
        """
        name = max(self._ranks, key=lambda one: len(self._ranks[one]))
        ranks = self._ranks[name]
        self.others += [p for one, paths in self._ranks.items() if one != name for p in paths]
        more = self._more(name)
        if not ranks or more is None:
            self.others += ranks
            return None
        ((usual, _),) = Counter(ranks.values()).most_common(1)
        unusual = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != usual}
        alpha = "lora_alpha" if name == "lora" else "alpha"
        return {
            "peft_type": _TYPES[name], "r": usual, alpha: usual, "rank_pattern": unusual,
            "alpha_pattern": dict(unusual), "target_modules": _targets(list(ranks)), **more,
        }  # fmt: skip

    def _more(self, name: str) -> dict[str, Any] | None:
        has = {suffix for one, suffix in map(str.split, self._names) if one == name}
        if name == "lora":
            return {"use_dora": "magnitude" in has, "lora_bias": BIAS in has}
        if name == "loha":
            return {"use_effective_conv2d": "hada_t1" in has}
        shapes = list(self._kinds.values())
        tried = [*sorted({n for shape in shapes for side in shape for n in side}), -1]
        fits = (n for n in tried if all(_divides(n, *shape) for shape in shapes))
        factor = next(fits, None)
        return None if factor is None else {
            "decompose_factor": factor, "decompose_both": "lokr_w1_a" in has,
            "use_effective_conv2d": "lokr_t2" in has,
        }  # fmt: skip


def packed(configs: Mapping[str, Mapping[str, Any] | None]) -> dict[str, str]:
    """diffusers' metadata of configs by component."""
    table = {
        f"{component}.{name}": value
        for component, config in configs.items()
        if config
        for name, value in config.items()
    }
    return {"lora_adapter_metadata": json.dumps(table, sort_keys=True)} if table else {}


def _sides(tensors: Tensors, w: str) -> tuple[int, int]:
    """(outputs, inputs) of a factor of LoKr."""
    if w in tensors:
        return tensors[w].shape[0], tensors[w].shape[1]
    a, b = tensors[w + "_a"], tensors[w + "_b"]
    return a.shape[int("lokr_t2" in tensors and w == "lokr_w2")], b.shape[1]


def _divides(factor: int, out: tuple[int, int], width: tuple[int, int]) -> bool:
    """Whether peft splits the sizes of a layer so with this ``decompose_factor``."""
    for a, b in (out, width):
        divides = factor > 0 and a * b % factor == 0
        # Other than LyCORIS, peft does not put the smaller of the two first then.
        if (a, b) != ((factor, a * b // factor) if divides else factorization(a * b, factor)):
            return False
    return True


def _targets(paths: list[str]) -> list[str] | str:
    """``paths`` for peft, which takes the name of a list for the end of one; else as a regex."""
    names = set(paths)
    ends = {path.split(".", n)[-1] for path in paths for n in range(1, path.count(".") + 1)}
    return "|".join(map(re.escape, sorted(names))) if names & ends else sorted(names)
