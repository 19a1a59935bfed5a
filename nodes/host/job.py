"""A training job: what it is told, what it gives, and what is said about it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.adapters import AdapterConfig, Algorithm
from ...core.archs import ArchSpec
from ...core.files import Adapter
from ...core.metadata import TrainingInfo, training_metadata
from ...core.train.checkpoints import TrainRun
from ...core.train.config import OptimizerConfig, TrainConfig
from ...core.train.data import TrainDataset
from ...core.train.loop import Progress
from ...core.train.targets import Targets

_PREDICTIONS = {"EPS": "epsilon", "V_PREDICTION": "v", "V_PREDICTION_EDM": "v"}
_RECENT = 20  # steps whose mean loss is shown


@dataclass(frozen=True)
class Job:
    """Everything a training run needs; None stands for the usual."""

    model: Any
    dataset: TrainDataset
    run: TrainRun
    config: TrainConfig
    on_existing: str = "resume"
    checkpointing: str = "auto"
    adapter: AdapterConfig | None = None
    targets: Targets | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: TrainDataset | None = None
    init_from: Adapter | None = None


@dataclass(frozen=True)
class Result:
    """What a run gives: the adapter, how it went, and what to tell the user."""

    adapter: Adapter
    progress: Progress
    report: str


@dataclass
class Pace:
    """Steps per second since training went on."""

    start: int
    since: float

    def per_step(self, step: int) -> float:
        """Seconds."""
        return (time.time() - self.since) / max(1, step - self.start)


def metadata(
    job: Job,
    arch: ArchSpec | None,
    adapters: Mapping[str, Algorithm],
    progress: Progress,
    started: float,
) -> dict[str, str]:
    """Metadata of the adapter file, as sd-scripts spells it."""
    first = next(iter(adapters.values()))
    is_lora = first.name == "lora"
    scale = job.model.get_model_object("latent_format").spacial_downscale_ratio
    height, width = (n * scale for n in max(job.dataset.buckets)[-2:])
    info = TrainingInfo(
        base_version=next(iter(arch.base_versions), "") if arch else "",
        architecture=next(iter(arch.modelspec), "") if arch else "",
        output_name=job.run.name,
        network_module="networks.lora" if is_lora else "lycoris.kohya",
        network_dim=first.rank,
        network_alpha=first.alpha,
        network_args={} if is_lora else {"algo": first.name},
        steps=progress.step,
        max_steps=job.config.steps,
        seed=job.config.seed,
        learning_rate=job.optimizer.learning_rate,
        optimizer="torch.optim.adamw.AdamW",
        optimizer_args={"weight_decay": job.optimizer.weight_decay},
        items=len(job.dataset),
        resolution=(width, height),
        started=started,
        finished=time.time(),
        batch_size=job.config.batch_size,
        accumulation=job.config.accumulation,
        max_grad_norm=job.optimizer.clip,
        prediction=_PREDICTIONS.get(job.model.model.model_type.name, "flow"),
    )
    return training_metadata(info)


def line(job: Job, progress: Progress, pace: Pace) -> str:
    """The state of the run in one line."""
    seconds = pace.per_step(progress.step)
    left = int(seconds * (job.config.steps - progress.step))
    held_out = f" · held-out {progress.validation[-1][1]:.4f}" if progress.validation else ""
    return (
        f"step {progress.step} of {job.config.steps} · loss {_mean(progress.losses[-_RECENT:]):.4f}"
        f"{held_out} · {seconds:.2f} s/step · {left // 60}:{left % 60:02} left"
    )


def text(
    job: Job,
    adapters: Mapping[str, Algorithm],
    progress: Progress,
    pace: Pace,
    notes: Sequence[str],
) -> str:
    """The report of a finished run."""
    count = sum(t.numel() for a in adapters.values() for t in a.tensors.values())
    resumed = f" (resumed at {pace.start})" if pace.start else ""
    lines = [f"{len(adapters)} modules, {count:,} parameters, {progress.step} steps{resumed}"]
    lines += [f"Note: {note}" for note in notes]
    losses, validation = progress.losses, progress.validation
    if losses:
        first, last = _mean(losses[:_RECENT]), _mean(losses[-_RECENT:])
        lines.append(f"training loss {first:.4f} -> {last:.4f}")
    if validation:
        lines.append(f"held-out loss {validation[0][1]:.4f} -> {validation[-1][1]:.4f}")
    if progress.step > pace.start:
        lines.append(f"{pace.per_step(progress.step):.3f} s/step")
    files = [path.name for _, path in job.run.checkpoints()]
    return "\n".join([*lines, f"adapter files: {len(files)}, the last is {files[-1]}"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
