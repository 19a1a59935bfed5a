"""Train Adapter."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..core.adapters import AdapterConfig
from ..core.files import Adapter
from ..core.train.config import OptimizerConfig, TrainConfig
from .host import model as host
from .host import paths
from .host.job import Job
from .host.trainer import Trainer
from .plots import loss_plot
from .types import (
    CATEGORY,
    AdapterConfigType,
    OptimizerConfigType,
    TrainDatasetType,
    TrainRunType,
    TrainTargetsType,
    panel,
)

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
            tooltip="If the run exists: go on where it stopped, delete it and start anew, or stop.",
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
        TrainDatasetType.Input(
            "validation",
            optional=True,
            tooltip="Items that are not trained on, to measure the loss on at each save.",
        ),
        io.LoraModel.Input(
            "init_from", optional=True, tooltip="An adapter to start from instead of from zero."
        ),
    ]


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
            inputs=[*_train_inputs(), *_train_sockets()],
            outputs=[
                io.Model.Output(tooltip="The model with the adapter on it."),
                io.LoraModel.Output(display_name="adapter", tooltip="The trained adapter."),
                TrainRunType.Output(display_name="run", tooltip="The run and its files."),
                io.LossMap.Output(display_name="loss_map", tooltip="Loss of each step."),
                io.Image.Output(display_name="loss_plot", tooltip="The loss curve."),
            ],
        )

    @classmethod
    def execute(
        cls,
        run_name: str,
        seed: int,
        init_from: dict[str, Any] | None = None,
        optimizer: OptimizerConfig | None = None,
        config: AdapterConfig | None = None,
        **given: Any,
    ) -> io.NodeOutput:
        numbers = {f.name: given.pop(f.name) for f in fields(TrainConfig) if f.name in given}
        job = Job(
            run=paths.run(run_name),
            config=TrainConfig(seed=seed, **numbers),
            adapter=config,
            optimizer=optimizer or OptimizerConfig(),
            init_from=None if init_from is None else Adapter.of(init_from),
            **given,
        )
        result = Trainer(job, cls.hidden.unique_id).run()
        losses, validation = result.progress.losses, result.progress.validation
        adapted = host.apply(job.model, None, result.adapter, 1.0, 0.0, "error")
        plot = loss_plot(losses, validation)
        ui = panel(result.report, {"losses": losses, "validation": validation})
        return io.NodeOutput(adapted.model, result.adapter, job.run, {"loss": losses}, plot, ui=ui)


NODES = [Train]
