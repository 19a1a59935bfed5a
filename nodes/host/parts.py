"""One adapter on one parameter of a model, with the strength it has there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...core.adapters import Algorithm, merge_all
from ...core.adapters.padded import RESHAPE
from ...core.schedule import Schedule
from .layers import dims

Slice = tuple[int, int, int]  # axis, offset, length


@dataclass(frozen=True, eq=False)
class Part:
    """Attributes:
    key: name of the parameter in the model. slice: the range of it, None for all.
    strength: m, of a schedule the value it is multiplied by.
    """

    key: str
    slice: Slice | None
    algorithm: Algorithm
    strength: float = 1.0
    schedule: Schedule = Schedule()

    @property
    def path(self) -> str:
        """Of the module that has the parameter."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Of the parameter inside its module."""
        return self.key.rpartition(".")[2]

    def module(self, model: nn.Module) -> Any:
        """The module of ``model`` that has the parameter."""
        return model.get_submodule(self.path)

    @property
    def varies(self) -> bool:
        """Whether the strength changes while sampling."""
        return self.schedule.constant is None and self.strength != 0

    def at(self, progress: float) -> float:
        """m at a progress from 0 to 1."""
        return self.strength * self.schedule.at(progress)


def merged(weight: Tensor, parts: Iterable[Part], progress: float = 0.0) -> Tensor:
    """W'(m) of every part one after another, in the dtype of ``weight``, which is left alone."""
    full = weight.detach().to(torch.float32, copy=True)
    strengths = ((part, part.at(progress)) for part in parts)
    acting = ((part.slice, part.algorithm.at(m)) for part, m in strengths if m)
    return merge_all(full, acting).to(weight.dtype)


def acts_on_layer(module: nn.Module, part: Part) -> bool:
    """Whether ``module``, which has the parameter, can take the part on its activations.

    A part that makes a weight larger is for more inputs than the layer gets without it.
    """
    named = part.name in ("weight", "bias") and dims(module) is not None
    return named and RESHAPE not in part.algorithm.tensors


def grouped(parts: Iterable[Part]) -> list[list[Part]]:
    """The parts of each parameter, in order."""
    by_key: dict[str, list[Part]] = {}
    for part in parts:
        by_key.setdefault(part.key, []).append(part)
    return list(by_key.values())
