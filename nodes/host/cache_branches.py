"""Which conditionings an evaluation of the model is of, and what a run remembers of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core.cache.branch import Branch
from ...core.cache.trace import Trace

_OF = 4  # of a key what is evaluated: uuid, side, window, size; the rest is in which way


class Branches:
    """The states of one run, of each conditioning, window, size and way of evaluating it its own.

    Args:
        conds: of the guider: name -> conditionings.

    Attributes:
        of: state by all that tells evaluations apart.
        length: residuals that each remembers.
        computed: what has been computed at this noise level, evaluated in whatever way.
        longest: run of skipped steps that there may be; None while that is unknown.
    """

    def __init__(self, conds: Mapping[str, Any]) -> None:
        self.names = {c.get("uuid"): name for name, listed in conds.items() for c in listed or ()}
        self.guided = set(conds) <= {"positive", "negative"}
        self.of: dict[Any, Branch] = {}
        self.computed: set[Any] = set()
        self.length = Trace().length
        self.longest: int | None = None
        self.sigma, self.count = math.inf, 0

    def visited(
        self, model: Any, options: dict[str, Any], x: Tensor, sigma: float, controlled: bool
    ) -> list[Branch]:
        """Those that an evaluation of ``model`` is of, in the order of the batch ``x``."""
        if sigma != self.sigma:
            self.sigma, self.count = sigma, self.count + 1
            self.computed.clear()
            self._drop()
        uuids: list[Any] = options["uuids"]
        window = options.get("context_window")
        place = (tuple(window.index_list) if window is not None else None, x.shape[1:])
        how = (len(x) // len(uuids), controlled, _hooks(model), *_patched(options))
        keys: list[Any] = []
        for uuid, index in zip(uuids, options.get("cond_or_uncond") or uuids, strict=True):
            # ComfyUI gives a copy of a conditioning with an area to the other side, uuid and all.
            key = (uuid, index, *place, *how)
            keys.append((*key, keys.count(key)))
        made = [self._branch(key) for key in keys]
        for branch in made:
            branch.seen = self.count
        return made

    def _branch(self, key: Any) -> Branch:
        if key not in self.of:
            uuid, index = key[:2]
            negative = self.names.get(uuid) == "negative" or (self.guided and index == 1)
            name = "uncond" if negative else "cond"
            self.of[key] = Branch(name, Trace(self.length), of=key[:_OF])
        return self.of[key]

    def _drop(self) -> None:
        """Forget what has not been evaluated for longer than a run of skipped steps may be."""
        if self.longest is not None:
            oldest = self.count - self.longest - 1
            self.of = {key: branch for key, branch in self.of.items() if branch.seen >= oldest}


def _hooks(model: Any) -> tuple[Any, ...]:
    """What conditionings put on the weights for this evaluation."""
    hooks = getattr(getattr(model, "current_patcher", None), "current_hooks", None)
    return tuple(hooks.hooks) if hooks is not None else ()


def _patched(options: dict[str, Any]) -> tuple[Any, ...]:
    """What others change in the network for this evaluation, by name: guidance by a network
    without some of its layers evaluates a conditioning twice."""
    replaced: dict[str, dict[Any, Any]] = options.get("patches_replace") or {}
    patches: dict[str, list[Any]] = options.get("patches") or {}
    places = tuple((kind, place) for kind, places in replaced.items() for place in places)
    return places, tuple((name, len(listed)) for name, listed in patches.items())
