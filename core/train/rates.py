"""Which factor learns how fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..adapters import Algorithm
from ..errors import AdapterLabError
from .config import OptimizerConfig
from .patterns import pattern
from .targets import in_model, pattern_name

# Factors that are not nothing at zero: a decay would take away the layer, not the adapter.
_LENGTHS = ("dora_scale", "scalar", "rescale")
# Whole tensors beside factors: without two sides, but no reason to refuse LoRA+ for the others.
_WHOLE = ("full", "norm")


class Rated(NamedTuple):
    """One factor, its peak learning rate, and whether weight decay may act on it."""

    name: str
    factor: Tensor
    rate: float
    decays: bool


def rated(adapters: Mapping[str, Algorithm], config: OptimizerConfig) -> list[Rated]:
    """Every factor that is trained, by module path.

    Raises:
        AdapterLabError: there is none; a pattern of ``rates`` matches no module; LoRA+ for an
            algorithm whose sides do not differ.
    """
    rates = _rates(adapters, config)
    if config.lora_plus != 1:
        _require_sides(adapters)
    found = [
        Rated(
            name=f"{path}|{suffix}",
            factor=factor,
            rate=rates[path] * (config.lora_plus if suffix in adapters[path].up else 1.0),
            decays=suffix.rpartition(".")[2] not in _LENGTHS,
        )
        for path in sorted(adapters)
        for suffix, factor in adapters[path].trained.items()
    ]
    if not found:
        raise AdapterLabError("There is nothing to train", found="no factor that may change")
    return found


def _rates(adapters: Mapping[str, Algorithm], config: OptimizerConfig) -> dict[str, float]:
    """Learning rate of each module."""
    own = config.parsed_rates()
    names = {path: pattern_name(path) for path in adapters}
    for text, _ in own:
        if not any(pattern(text).fullmatch(name) for name in names.values()):
            raise AdapterLabError(
                f"The pattern '{text}' of 'rates' matches no module in training",
                expected=f"whole names such as '{next(iter(names.values()))}'",
            )
    text_rate = config.text_encoder_rate or config.learning_rate
    return {
        path: next(
            (rate for text, rate in own if pattern(text).fullmatch(name)),
            config.learning_rate if in_model(path) else text_rate,
        )
        for path, name in names.items()
    }


def _require_sides(adapters: Mapping[str, Algorithm]) -> None:
    alike = {a.title for a in adapters.values() if not a.up and a.name not in _WHOLE}
    if alike or not any(a.up for a in adapters.values()):
        titles = ", ".join(sorted(alike or {a.title for a in adapters.values()}))
        raise AdapterLabError(
            f"LoRA+ has no meaning for {titles}",
            found="no side that starts at zero and acts last",
            expected="LoRA or another algorithm of two sides",
            fix="Set 'lora_plus' to 1",
        )
