"""Adapters that act while a model runs: on activations, or in the place of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import comfy.model_patcher
import torch.nn as nn
from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import Tensor

from .forward import Factors, Forward
from .parts import Part, grouped
from .schedule import progress
from .values import Value, replaced

KEY = "adapter_lab"


class Acting:
    """Everything that acts on one clone of a model.

    It is an attachment of the clone's ``ModelPatcher``, whose clones get one of their own.

    Attributes:
        layers: on activations. values: replaced parameters.
        progress: of the sampling that goes on, 0 to 1.
    """

    def __init__(self, layers: Iterable[Factors] = (), values: Iterable[Part] = ()) -> None:
        self.layers, self.values = tuple(layers), tuple(values)
        self.progress = 0.0
        self._live: list[Forward | Value] = []
        self._last: tuple[Any, float, float] = (None, 0.0, 0.0)

    def on_model_patcher_clone(self) -> Acting:
        return Acting(self.layers, self.values)

    @property
    def varies(self) -> bool:
        """Whether any strength changes while sampling."""
        return any(part.varies for part in (*(f.part for f in self.layers), *self.values))

    def install(self, patcher: Any) -> None:
        """Act on the patcher's model, in the place of what another clone left there."""
        self.remove()
        by_path: dict[str, list[Factors]] = {}
        for factors in self.layers:
            by_path.setdefault(factors.part.path, []).append(factors)
        for path, group in by_path.items():
            self._live.append(Forward(patcher.model.get_submodule(path), group, self))
        for parts in grouped(self.values):
            if not any(part.varies for part in parts):
                self._live.append(Value(patcher, parts))

    def remove(self) -> None:
        """Leave the model as it was."""
        while self._live:
            self._live.pop().remove()

    @contextmanager
    def at(self, sigma: float, model: Any) -> Iterator[None]:
        """Everything at the strength of the noise level ``sigma``."""
        sampling, before = model.model_sampling, self.progress
        if self._last[0] is not sampling or self._last[1] != sigma:
            self._last = (sampling, sigma, progress(sampling, sigma))
        self.progress = self._last[2]
        try:
            with ExitStack() as stack:
                for parts in grouped(self.values):
                    if any(part.varies for part in parts):
                        stack.enter_context(replaced(model, parts, self.progress))
                yield
        finally:
            self.progress = before


def attach(patcher: Any, parts: Sequence[Part], layers: Sequence[Part]) -> None:
    """Let more act on a clone, together with what acts on it already.

    Args:
        parts: replace parameters. layers: act on activations.
    """
    given: Acting = patcher.get_attachment(KEY) or Acting()
    beside = patcher.get_additional_models_with_key(KEY)
    held = [_managed(layers, patcher.load_device, patcher.offload_device)] if layers else []
    if held:
        patcher.set_additional_models(KEY, [*beside, *held])
    acting = Acting((*given.layers, *chain(*(h.model for h in held))), (*given.values, *parts))
    patcher.set_attachments(KEY, acting)
    patcher.set_injections(KEY, [PatcherInjection(_inject, _eject)])
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    if acting.varies:
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _follow)


def _managed(parts: Sequence[Part], device: Any, rest: Any, disable_dynamic: bool = False) -> Any:
    """Factors as a model of their own, which ComfyUI loads and unloads with a diffusion model.

    With a text encoder it loads nothing else: there, layers copy them to where they compute.
    """
    given = comfy.model_patcher
    kind = given.ModelPatcher if disable_dynamic else given.CoreModelPatcher
    held = kind(nn.ModuleList(map(Factors, parts)), device, rest)
    held.cached_patcher_init = (_managed, (parts, device, rest))
    return held


def _inject(patcher: Any) -> None:
    patcher.get_attachment(KEY).install(patcher)


def _eject(patcher: Any) -> None:
    patcher.get_attachment(KEY).remove()


def _follow(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Around each call of a model on x, sigma, ..: the strengths of this noise level."""
    model: Any = executor.class_obj
    acting = model.current_patcher and model.current_patcher.get_attachment(KEY)
    if not acting:
        return executor(*args, **kwargs)
    with acting.at(float(args[1].flatten()[0]), model):
        return executor(*args, **kwargs)
