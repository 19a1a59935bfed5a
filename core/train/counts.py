"""How many numbers a choice of modules holds and would train, by arithmetic on shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..adapters import AdapterConfig
from ..adapters.training import base_of, make, training_notes

Shape = tuple[int, ...]


class Count(NamedTuple):
    """Attributes:
    weights: numbers in the weights of the modules. trained: numbers that training changes.
    notes: what is worth knowing of the configuration on these weights.
    """

    weights: int
    trained: int
    notes: tuple[str, ...]


def count(modules: Iterable[tuple[Shape, bool]], config: AdapterConfig) -> Count:
    """Of ``modules``, (shape of the weight, whether there is a bias beside it).

    One adapter is made for each shape, so that models of any size take no time.

    Raises:
        AdapterLabError: the configuration is not for one of the shapes.
    """
    kinds, notes = Counter(modules), Counter[str]()
    weights = trained = 0
    for (shape, biased), number in kinds.items():
        weights += number * math.prod(shape)
        trained += number * _trained(shape, biased, config)
        notes.update(dict.fromkeys(training_notes(shape, config), number))
    return Count(weights, trained, tuple(f"{note} ({n} modules)" for note, n in notes.items()))


def _trained(shape: Shape, biased: bool, config: AdapterConfig) -> int:
    if len(shape) > 1 and base_of(config.algorithm) == "full":
        return math.prod(shape) + (shape[0] if biased and config.bias else 0)
    made = make(shape, config, torch.Generator(), biased=biased)
    return sum(tensor.numel() for tensor in made.trained.values())
