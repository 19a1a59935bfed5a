"""Train Adapter and what it is configured with."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.adapters import ALGORITHMS, AdapterConfig
from ..core.files import Adapter
from ..core.train.checkpoints import TrainRun
from ..core.train.config import OptimizerConfig, TrainConfig
from ..core.train.data import TrainDataset
from ..core.train.targets import PRESETS, Targets
from .host import model as host
from .host import paths, session
from .host.trainer import Job, Trainer
from .plots import loss_plot
from .types import (
    CATEGORY,
    AdapterConfigType,
    OptimizerConfigType,
    TrainDatasetType,
    TrainRunType,
    TrainTargetsType,
    lines,
    panel,
)

_CATEGORY = f"{CATEGORY}/train"


class Config(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabConfig",
            display_name="Adapter Config",
            category=_CATEGORY,
            description="Which algorithm to train, and how large.",
            search_aliases=["rank", "alpha", *ALGORITHMS],
            inputs=[
                io.Combo.Input(
                    "algorithm",
                    options=list(ALGORITHMS),
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
                io.Boolean.Input(
                    "decompose_both",
                    default=False,
                    advanced=True,
                    tooltip="lokr: low rank in the first factor as well.",
                ),
                io.Boolean.Input(
                    "full_matrix",
                    default=False,
                    advanced=True,
                    tooltip="lokr: no low rank at all; rank and alpha are then without effect.",
                ),
                io.Boolean.Input(
                    "tucker",
                    default=False,
                    advanced=True,
                    tooltip="Tucker decomposition of k x k convolutions: smaller, for models with "
                    "convolutions.",
                ),
            ],
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
        text = "\n".join([f"{len(chosen)} of {len(modules)} modules", *chosen])
        return io.NodeOutput(targets, text, ui=panel(text))


class Optimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabOptimizer",
            display_name="Optimizer",
            category=_CATEGORY,
            description="How the factors are updated.",
            search_aliases=["learning rate", "adamw", "weight decay", "warmup"],
            inputs=[
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
            ],
            outputs=[
                OptimizerConfigType.Output(display_name="optimizer", tooltip="For Train Adapter.")
            ],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(OptimizerConfig(**options))


def _count(name: str, default: int, least: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=default, min=least, max=10_000_000, tooltip=tooltip)


def _train_inputs() -> list[io.Input]:
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
            inputs=_train_inputs(),
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
        model: Any,
        dataset: TrainDataset,
        run_name: str,
        steps: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        save_every: int,
        keep_last: int,
        on_existing: str,
        checkpointing: str,
        config: AdapterConfig | None = None,
        targets: Targets | None = None,
        optimizer: OptimizerConfig | None = None,
        validation: TrainDataset | None = None,
        init_from: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        job = Job(
            model,
            dataset,
            TrainRun(run_name.strip(), paths.run_folder(run_name), paths.run_adapters(run_name)),
            TrainConfig(steps, batch_size, accumulation, seed, save_every, keep_last),
            on_existing,
            checkpointing,
            config or AdapterConfig(),
            targets or Targets(),
            optimizer or OptimizerConfig(),
            validation,
            None if init_from is None else Adapter.of(init_from),
        )
        result = Trainer(job, cls.hidden.unique_id).run()
        progress = result.progress
        adapted = host.apply(model, None, result.adapter, 1.0, 0.0, "error")
        plot = loss_plot(progress.losses, progress.validation)
        losses = {"loss": list(progress.losses)}
        ui = panel(result.report, {"losses": progress.losses, "validation": progress.validation})
        return io.NodeOutput(adapted.model, result.adapter, job.run, losses, plot, ui=ui)


NODES = [Config, ChooseTargets, Optimizer, Train]
