"""What a training run is, as plain numbers. Everything validates itself when it is built."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import require_choice, require_range
from ..errors import AdapterLabError
from .optimizers import FIELDS, OPTIMIZERS, Row
from .patterns import pattern
from .schedules import SCHEDULES, Shape, share

ROUNDINGS = ("stochastic", "kahan")


@dataclass(frozen=True)
class OptimizerConfig:
    """How the factors are updated.

    Args:
        optimizer: a key of ``OPTIMIZERS``.
        learning_rate: peak learning rate, reached after ``warmup`` steps.
        weight_decay: as the optimizer has it, decoupled in most.
        clip: largest norm of the gradient of all factors together, 0 for none.
        warmup: steps of linear warm-up.
        schedule: one of ``SCHEDULES``; ``cycles``, ``power``, ``decay`` and ``final`` shape it,
            see :class:`Shape`.
        betas: numbers with commas between them; empty for the optimizer's own.
        lora_plus: how many times the rate of the side that starts at zero is that of the other
            (Hayou et al. 2024, "LoRA+", section 4.2), 1 for the same.
        rates: one ``pattern = rate`` a line: the learning rate of modules whose whole name the
            regular expression matches; the first that matches counts.
        text_encoder_rate: learning rate of text encoders, 0 for that of the model.
        rounding: how bfloat16 factors take up updates that are smaller than their resolution.
        arguments: one ``name = value`` a line, for the optimizer's class.
    """

    optimizer: str = "AdamW"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 0
    schedule: str = "constant"
    cycles: int = 1
    power: float = 1.0
    decay: float = 0.2
    final: float = 0.0
    betas: str = ""
    lora_plus: float = 1.0
    rates: str = ""
    text_encoder_rate: float = 0.0
    rounding: str = "stochastic"
    arguments: str = ""

    def __post_init__(self) -> None:
        require_choice("optimizer", self.optimizer, OPTIMIZERS)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("rounding", self.rounding, ROUNDINGS)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise AdapterLabError(
                "The learning rate is unusable",
                found=str(self.learning_rate),
                expected=f"a positive number, {self.row.rate:g} for most adapters",
            )
        for name, (least, most) in _RANGES.items():
            require_range(name, getattr(self, name), least, most)
        self.parsed_betas()
        self.parsed_rates()
        self.parsed_arguments()

    @property
    def row(self) -> Row:
        """What there is to know of the optimizer."""
        return OPTIMIZERS[self.optimizer]

    def share(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at ``step`` (counted from 0) of ``steps``."""
        shape = Shape(self.warmup, self.cycles, self.power, self.decay, self.final)
        return share(self.schedule, step, steps, shape)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of ``step`` (counted from 0) of ``steps``."""
        return self.learning_rate * self.share(step, steps)

    def parsed_betas(self) -> tuple[float, ...]:
        """The betas to use; empty where the optimizer has none."""
        if not self.betas.strip():
            return self.row.betas
        count = len(self.row.betas)
        try:
            found = tuple(float(part) for part in self.betas.split(","))
        except ValueError:
            found = ()
        if len(found) != count or not count or not all(0 <= beta < 1 for beta in found):
            usual = ", ".join(map(str, self.row.betas))
            raise AdapterLabError(
                f"'betas' of {self.optimizer} are unusable",
                found=self.betas,
                expected=f"{count} numbers from 0 to below 1 such as {usual}" if count else "none",
            )
        return found

    def parsed_rates(self) -> list[tuple[str, float]]:
        """(pattern, learning rate) of each line of ``rates``."""
        found: list[tuple[str, float]] = []
        for text, value in _assignments("rates", self.rates, "double_blocks.* = 5e-5"):
            pattern(text)
            try:
                rate = float(value)
            except ValueError:
                rate = math.nan
            if not (math.isfinite(rate) and rate > 0):
                raise AdapterLabError(
                    f"The learning rate of '{text}' is unusable",
                    found=value,
                    expected="a positive number",
                    fix="To leave modules out, exclude them from the targets",
                )
            found.append((text, rate))
        return found

    def parsed_arguments(self) -> dict[str, Any]:
        """Arguments for the optimizer's class."""
        found: dict[str, Any] = {}
        for name, value in _assignments("arguments", self.arguments, "eps = 1e-6"):
            if name in FIELDS:
                raise AdapterLabError(
                    f"'{name}' is no argument of its own", fix=f"Set '{FIELDS[name]}'"
                )
            try:
                found[name] = ast.literal_eval(_WORDS.get(value.lower(), value))
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                found[name] = value.strip("\"'")
        return found

    def notes(self) -> list[str]:
        """What looks wrong but may be meant, a sentence each."""
        row, rate, found = self.row, self.learning_rate, list[str]()
        if not row.rate / 50 <= rate <= row.rate * 50:
            why = ", which it multiplies with the rate that it finds by itself"
            found.append(
                f"a learning rate of {rate:g} is unusual for {self.optimizer}: "
                f"{row.rate:g} is its usual one{why if row.estimates else ''}"
            )
        if row.averages and self.schedule != "constant":
            found.append(
                f"{self.optimizer} needs no schedule, since it averages the factors: 'constant' "
                "is meant for it"
            )
        if row.estimates and self.warmup and "safeguard_warmup" not in self.arguments:
            found.append(
                f"with a warm-up, {self.optimizer} is better given the argument "
                "'safeguard_warmup = True'"
            )
        return found


# name -> least and most, both allowed
_RANGES: Mapping[str, tuple[float, float]] = {
    "weight_decay": (0, 1000),
    "clip": (0, 1e6),
    "warmup": (0, 10**9),
    "cycles": (1, 10_000),
    "power": (0.01, 100),
    "decay": (0.001, 1),
    "final": (0, 1),
    "lora_plus": (0.01, 1000),
    "text_encoder_rate": (0, 1000),
}
_WORDS = {"true": "True", "false": "False", "none": "None", "null": "None"}


def _assignments(name: str, text: str, example: str) -> list[tuple[str, str]]:
    """Both sides of each line ``left = right``; the last sign counts, patterns may have some."""
    found: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        left, sign, right = (part.strip() for part in line.rpartition("="))
        if not (left and sign and right):
            raise AdapterLabError(
                f"A line of '{name}' is unusable", found=line, expected=f"'{example}'"
            )
        found.append((left, right))
    return found


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions, and what to keep.

    Args:
        steps: optimiser steps in all, resumed ones included.
        batch_size: items of one forward pass.
        accumulation: forward passes of one optimiser step.
        seed: fixes initial factors, order, noise and timesteps; 0 to 2^64 - 1.
        save_every: steps between two adapter files, 0 for the last only.
        keep_last: how many adapter files to keep, 0 for all.
    """

    steps: int = 500
    batch_size: int = 1
    accumulation: int = 1
    seed: int = 0
    save_every: int = 100
    keep_last: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "accumulation": 1, "save_every": 0, "keep_last": 0}
        for name, bound in least.items():
            require_range(name, getattr(self, name), bound)
        require_range("seed", self.seed, 0, 2**64 - 1)

    def saves_at(self, step: int) -> bool:
        """Whether an adapter file is written after ``step`` completed steps."""
        due = self.save_every > 0 and step % self.save_every == 0
        return due or step == self.steps
