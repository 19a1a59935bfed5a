"""Optimizer: how the factors are updated, and how fast."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.train.config import ROUNDINGS, OptimizerConfig
from ..core.train.optimizers import OPTIMIZERS, PACKAGES
from ..core.train.schedules import SCHEDULES
from .types import CATEGORY, OptimizerConfigType, panel

_STEPS, _POINTS = 1000, 100  # of the curve that is shown


def _float(name: str, default: float, most: float, step: float, tooltip: str, **more: Any) -> Any:
    more = {"min": 0.0, "round": False, **more}
    return io.Float.Input(name, default=default, max=most, step=step, tooltip=tooltip, **more)


def _text(name: str, tooltip: str, multiline: bool = True) -> Any:
    return io.String.Input(
        name, default="", multiline=multiline, optional=True, advanced=True, tooltip=tooltip
    )


def _main_inputs() -> list[Any]:
    first = {row.package: name for name, row in reversed(OPTIMIZERS.items())}
    needed = [
        f"{name} and the like need {PACKAGES[package]}."
        for package, name in first.items()
        if package != OPTIMIZERS["AdamW"].package
    ]
    return [
        io.Combo.Input(
            "optimizer",
            options=list(OPTIMIZERS),
            tooltip=" ".join(["AdamW suits most; Prodigy finds the rate by itself.", *needed]),
        ),
        _float(
            "learning_rate", 1e-4, 10.0, 1e-6,
            "Step size at its peak. 1e-4 for most models and LoRA, 1 for Prodigy; too high gives "
            "noise, too low learns nothing.",
            min=1e-8,
        ),
        _float("weight_decay", 0.01, 1.0, 0.001, "Pull of the factors towards zero."),
        _float(
            "clip", 1.0, 1000.0, 0.1,
            "Longest gradient of a step; longer ones are shortened. 0 for no limit.",
            advanced=True,
        ),
        io.Int.Input(
            "warmup", default=0, min=0, max=100_000, advanced=True,
            tooltip="Steps over which the learning rate rises from 0.",
        ),
    ]  # fmt: skip


def _schedule_inputs() -> list[Any]:
    rare: dict[str, Any] = {"optional": True, "advanced": True}
    return [
        io.Combo.Input(
            "schedule", options=list(SCHEDULES), default="constant", optional=True,
            tooltip="How the learning rate falls after the warm-up until the last step.",
        ),
        io.Int.Input(
            "cycles", default=1, min=1, max=10_000, **rare,
            tooltip="cosine with restarts: how many descents.",
        ),
        _float("power", 1.0, 100.0, 0.1, "polynomial: the exponent.", min=0.01, **rare),
        _float(
            "decay", 0.2, 1.0, 0.05, "wsd: share of the run in which the rate falls.",
            min=0.001, **rare,
        ),
        _float(
            "final", 0.0, 1.0, 0.05, "Share of the learning rate that is left at the end.", **rare
        ),
    ]  # fmt: skip


def _rate_inputs() -> list[Any]:
    rare: dict[str, Any] = {"optional": True, "advanced": True}
    return [
        _text("betas", "Numbers such as 0.9, 0.99; empty for the optimizer's own.", False),
        _float(
            "lora_plus", 1.0, 1000.0, 1.0,
            "LoRA+: how many times faster the up side learns; 1 for the same, 16 in the paper.",
            min=0.01, **rare,
        ),
        _text(
            "rates",
            "Other learning rates for some modules, a line each: a regular expression over whole "
            "names and a rate, such as double_blocks.* = 5e-5. The first that matches counts.",
        ),
        _float(
            "text_encoder_rate", 0.0, 10.0, 1e-6,
            "Learning rate of text encoders; 0 for the same as of the model.", **rare,
        ),
        io.Combo.Input(
            "rounding", options=list(ROUNDINGS), default="stochastic", **rare,
            tooltip="For bf16 factors, so that small updates are not lost. stochastic: right on "
            "average. kahan: keeps what rounding leaves over, exact, at 2 bytes a parameter.",
        ),
        _text("arguments", "Other arguments of the optimizer, a line each, such as eps = 1e-6."),
    ]  # fmt: skip


class Optimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabOptimizer",
            display_name="Optimizer",
            category=f"{CATEGORY}/train",
            description="How the factors are updated, and how fast. Shows the learning rate over "
            "a run.",
            search_aliases=["learning rate", "weight decay", "warmup", "lr scheduler", *OPTIMIZERS],
            has_intermediate_output=True,
            inputs=[*_main_inputs(), *_schedule_inputs(), *_rate_inputs()],
            outputs=[
                OptimizerConfigType.Output(display_name="optimizer", tooltip="For Train Adapter.")
            ],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        config = OptimizerConfig(**options)
        config.row.resolve()
        rates = [[i, config.rate(i, _STEPS)] for i in range(0, _STEPS, _STEPS // _POINTS)]
        rates.append([_STEPS, config.rate(_STEPS - 1, _STEPS)])
        text = "\n".join(
            [
                f"{config.optimizer}, {config.schedule}, shown over {_STEPS} steps",
                *(f"Note: {note}" for note in config.notes()),
            ]
        )
        return io.NodeOutput(config, ui=panel(text, {"rates": rates}))


NODES = [Optimizer]
