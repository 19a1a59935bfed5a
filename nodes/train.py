"""Train Adapter."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..core.adapters import AdapterConfig
from ..core.files import Adapter
from ..core.train.config import OptimizerConfig, TrainConfig
from ..core.train.objective import ObjectiveConfig
from .host import paths
from .host.trackers import TRACKERS
from .plots import loss_plot
from .types import (
    CATEGORY,
    AdapterConfigType,
    ObjectiveConfigType,
    OptimizerConfigType,
    TrainDatasetType,
    TrainPreviewType,
    TrainRunType,
    TrainTargetsType,
    curve,
    panel,
)

if TYPE_CHECKING:
    from .host.job import Result

_CATEGORY = f"{CATEGORY}/train"


def _count(name: str, default: int, least: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=default, min=least, max=10_000_000, tooltip=tooltip)


def _train_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model to train on. It is left as it is."),
        TrainDatasetType.Input("dataset", tooltip="What to learn."),
        io.String.Input(
            "run_name",
            default="my adapter",
            tooltip="Folder name of the run in output/adapter_lab/runs and of its adapter files "
            "in output/loras.",
        ),
        _count("steps", 500, 1, "Updates in all, those of a resumed run included."),
        _count("batch_size", 1, 1, "Items per forward pass, each with its own caption."),
        _count("accumulation", 1, 1, "Forward passes per update: a larger batch for less memory."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="Fixes the initial factors, the order of items, the noise and the timesteps.",
        ),
        _count("save_every", 100, 0, "Steps between two adapter files, 0 for the last only."),
        _count("keep_last", 0, 0, "How many adapter files to keep, 0 for all."),
        io.Combo.Input(
            "on_existing",
            options=["resume", "restart", "error"],
            tooltip="If the run exists: go on where it stopped, start anew and keep the old one "
            "under a new name, or stop.",
        ),
        io.Combo.Input(
            "checkpointing",
            options=["auto", "off", "blocks"],
            tooltip="blocks: keep only the inputs of each block and compute the rest again, much "
            "less memory for a third more time. auto: on for GPUs.",
        ),
    ]


def _train_sockets() -> list[Any]:
    return [
        AdapterConfigType.Input(
            "config", optional=True, tooltip="Algorithm and rank; LoRA of rank 16 without."
        ),
        TrainTargetsType.Input(
            "targets", optional=True, tooltip="Modules to train; the architecture's usual without."
        ),
        OptimizerConfigType.Input(
            "optimizer", optional=True, tooltip="Learning rate and so on; AdamW at 1e-4 without."
        ),
        ObjectiveConfigType.Input(
            "objective", optional=True, tooltip="What is minimised; the usual without."
        ),
        TrainPreviewType.Input(
            "preview", optional=True, tooltip="Pictures to sample while training; none without."
        ),
        TrainDatasetType.Input(
            "validation",
            optional=True,
            tooltip="Items that are not trained on, to measure the loss on at each save.",
        ),
        io.LoraModel.Input(
            "init_from", optional=True, tooltip="An adapter to start from instead of from zero."
        ),
    ]


def _more_inputs() -> list[Any]:
    """What was added later, in that order; left out of prompts that were saved without it."""
    return [
        _switch(
            "ema_tracking", True, "Keep two averages of the factors and save them beside each "
            "checkpoint, for Post-hoc EMA."
        ),
        io.Clip.Input(
            "clip", optional=True, tooltip="The text encoder, where Training Targets train it."
        ),
        io.Int.Input(
            "chunk", default=0, min=0, max=10_000_000, optional=True, advanced=True,
            tooltip="Steps to train each time the graph is queued, so that other prompts get their "
            "turn; 0 for all at once.",
        ),
        _switch(
            "offload_activations", False, "Keep what the backward pass needs in the memory of the "
            "CPU: slower, for less memory. Needs checkpointing."
        ),
        _choice(
            "streaming", ["auto", "off", "on"], "Keep the frozen weights in the memory of the CPU "
            "and bring each to the GPU when it is its turn. auto: where the model does not fit."
        ),
        _switch("compile", False, "Compile the blocks: minutes more at the start, faster steps."),
        _choice(
            "compute", ["auto", "fp32", "bf16", "fp16"], "Precision of the computation; auto: as "
            "the model samples."
        ),
        _choice(
            "trackers", list(TRACKERS), "Also send the curves to TensorBoard (files in the run's "
            "folder) or wandb, where installed."
        ),
    ]  # fmt: skip


def _switch(name: str, default: bool, tooltip: str) -> io.Input:
    return io.Boolean.Input(name, default=default, optional=True, advanced=True, tooltip=tooltip)


def _choice(name: str, options: list[str], tooltip: str) -> io.Input:
    return io.Combo.Input(
        name, options=options, default=options[0], optional=True, advanced=True, tooltip=tooltip
    )


class Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabTrain",
            display_name="Train Adapter",
            category=_CATEGORY,
            description="Trains an adapter on cached latents. Cancel at any time: what was learned "
            "is on disk, and queueing again goes on from there.",
            search_aliases=["train lora", "finetune", "fine-tune", "dreambooth", "lora trainer"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[*_train_inputs(), *_train_sockets(), *_more_inputs()],
            outputs=[
                io.Model.Output(tooltip="The model with the adapter on it."),
                io.LoraModel.Output(display_name="adapter", tooltip="The trained adapter."),
                TrainRunType.Output(display_name="run", tooltip="The run and its files."),
                io.LossMap.Output(display_name="loss_map", tooltip="Loss of each step."),
                io.Image.Output(display_name="loss_plot", tooltip="The loss curve."),
                io.Clip.Output(tooltip="The text encoder, with the adapter on it if it has one."),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, run_name: str | None = None, chunk: int | None = 0, **_: Any
    ) -> float:
        """What makes ComfyUI execute again where nothing else changed: a chunk that was done.

        Values that come over a link are not known here.
        """
        if chunk is None or (chunk and run_name is None):
            return math.nan
        return paths.run(run_name or "").config_step() if chunk else 0

    @classmethod
    def execute(
        cls,
        run_name: str,
        seed: int,
        init_from: dict[str, Any] | None = None,
        optimizer: OptimizerConfig | None = None,
        objective: ObjectiveConfig | None = None,
        config: AdapterConfig | None = None,
        **given: Any,
    ) -> io.NodeOutput:
        # Not before it is needed: ComfyUI starts sooner without a trainer.
        from .host.job import Job
        from .host.trainer import Trainer

        numbers = {f.name: given.pop(f.name) for f in fields(TrainConfig) if f.name in given}
        job = Job(
            run=paths.run(run_name),
            config=TrainConfig(seed=seed, **numbers),
            adapter=config,
            optimizer=optimizer or OptimizerConfig(),
            objective=objective or ObjectiveConfig(),
            init_from=None if init_from is None else Adapter.of(init_from),
            **given,
        )
        result = Trainer(job, cls.hidden.unique_id).run()
        losses = result.progress.losses
        plot = loss_plot(losses, result.progress.validation)
        ui = panel(result.report, _shown(result))
        return io.NodeOutput(
            result.model, result.adapter, job.run, {"loss": losses}, plot, result.clip, ui=ui
        )


def _shown(result: Result) -> dict[str, Any]:
    """For the panel on the node."""
    return {
        "losses": result.progress.losses,
        "validation": result.progress.validation,
        "rates": curve(result.rates),
        "previews": [{"step": step, "images": images} for step, images in result.previews],
        "continues": result.continues,
    }


NODES = [Train]
