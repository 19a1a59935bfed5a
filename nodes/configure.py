"""Adapter Config, Training Targets, Optimizer: what Train Adapter is told."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.adapters import ALGORITHMS, AdapterConfig
from ..core.train.config import OptimizerConfig
from ..core.train.targets import PRESETS, Targets
from .host import model as host
from .host import session
from .types import (
    CATEGORY,
    AdapterConfigType,
    OptimizerConfigType,
    TrainTargetsType,
    lines,
    panel,
)

_CATEGORY = f"{CATEGORY}/train"


_SWITCHES = {
    "decompose_both": "lokr: low rank in the first factor as well.",
    "full_matrix": "lokr: no low rank at all; rank and alpha are then without effect.",
    "tucker": "Tucker decomposition of k x k convolutions: smaller, for models with convolutions.",
}


def _switch(name: str, tooltip: str) -> io.Input:
    return io.Boolean.Input(name, default=False, advanced=True, tooltip=tooltip)


def _adapter_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "algorithm",
            options=[name for name, a in ALGORITHMS.items() if a.trainable],
            tooltip="lora: works everywhere. loha: rank r^2 for the size of 2r. lokr: "
            "smallest files, Kronecker product.",
        ),
        io.Int.Input(
            "rank",
            default=16,
            min=1,
            max=4096,
            tooltip="Capacity: more rank learns more detail, makes a larger file and "
            "memorises sooner. 8 to 32 for most.",
        ),
        io.Float.Input(
            "alpha",
            default=16.0,
            min=0.0,
            max=4096.0,
            step=0.5,
            tooltip="The delta is scaled by alpha / rank. Equal to the rank is neutral; 0 "
            "means equal to the rank.",
        ),
        io.Int.Input(
            "factor",
            default=-1,
            min=-1,
            max=4096,
            advanced=True,
            tooltip="lokr: size of the first factor; -1 takes the most balanced split, "
            "small numbers make larger files.",
        ),
        *(_switch(name, tooltip) for name, tooltip in _SWITCHES.items()),
    ]


class Config(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabConfig",
            display_name="Adapter Config",
            category=_CATEGORY,
            description="Which algorithm to train, and how large.",
            search_aliases=["rank", "alpha", *ALGORITHMS],
            inputs=_adapter_inputs(),
            outputs=[AdapterConfigType.Output(display_name="config", tooltip="For Train Adapter.")],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(AdapterConfig(**options))


class ChooseTargets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        pattern = "One regular expression a line, matched against whole names such as "
        return io.Schema(
            node_id="AdapterLabTargets",
            display_name="Training Targets",
            category=_CATEGORY,
            description="Which modules of the model to train. The node lists them before training.",
            search_aliases=["lora modules", "exclude patterns", "include patterns", "blocks"],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to train on."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    tooltip=" ".join(f"{name}: {what}." for name, what in PRESETS.items()),
                ),
                io.String.Input(
                    "exclude",
                    default="",
                    multiline=True,
                    tooltip=f"{pattern}double_blocks.0.img_attn.qkv: modules to leave out.",
                ),
                io.String.Input(
                    "include",
                    default="",
                    multiline=True,
                    tooltip=f"{pattern}double_blocks.0.img_attn.qkv: modules to keep although "
                    "excluded. Exclude .* to train only these.",
                ),
            ],
            outputs=[
                TrainTargetsType.Output(display_name="targets", tooltip="For Train Adapter."),
                io.String.Output(display_name="modules", tooltip="The chosen modules."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, preset: str, exclude: str, include: str) -> io.NodeOutput:
        targets = Targets(preset, lines(exclude), lines(include))
        modules = session.layers(model)
        chosen = targets.select(modules, host.architecture(model))
        idle = [f"Note: '{pattern}' matches no whole name" for pattern in targets.idle(modules)]
        text = "\n".join([f"{len(chosen)} of {len(modules)} modules", *idle, *chosen])
        return io.NodeOutput(targets, text, ui=panel(text))


def _optimizer_inputs() -> list[Any]:
    return [
        io.Combo.Input("optimizer", options=["AdamW"], tooltip="The update rule."),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=1e-8,
            max=1.0,
            step=1e-6,
            round=False,
            tooltip="Step size. 1e-4 for most models and LoRA; too high gives noise, too "
            "low learns nothing.",
        ),
        io.Float.Input(
            "weight_decay",
            default=0.01,
            min=0.0,
            max=1.0,
            step=0.001,
            round=False,
            tooltip="Pull of the factors towards zero.",
        ),
        io.Float.Input(
            "clip",
            default=1.0,
            min=0.0,
            max=1000.0,
            step=0.1,
            advanced=True,
            tooltip="Longest gradient of a step; longer ones are shortened. 0 for no limit.",
        ),
        io.Int.Input(
            "warmup",
            default=0,
            min=0,
            max=100_000,
            advanced=True,
            tooltip="Steps over which the learning rate rises from 0.",
        ),
    ]


class Optimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabOptimizer",
            display_name="Optimizer",
            category=_CATEGORY,
            description="How the factors are updated.",
            search_aliases=["learning rate", "adamw", "weight decay", "warmup"],
            inputs=_optimizer_inputs(),
            outputs=[
                OptimizerConfigType.Output(display_name="optimizer", tooltip="For Train Adapter.")
            ],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(OptimizerConfig(**options))


NODES = [Config, ChooseTargets, Optimizer]
