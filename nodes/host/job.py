"""A training job: what it is told, what it gives, and what of it may change when it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ...core.adapters import AdapterConfig, Algorithm
from ...core.checks import require_choice, require_range
from ...core.errors import AdapterLabError
from ...core.files import Adapter
from ...core.train.checkpoints import TrainRun
from ...core.train.config import OptimizerConfig, TrainConfig
from ...core.train.data import TrainDataset
from ...core.train.objective import ObjectiveConfig
from ...core.train.progress import Progress
from ...core.train.record import flat, plain
from ...core.train.targets import Targets
from .fingerprint import fingerprint, tensor_fingerprint
from .preview import PreviewConfig
from .session import SessionOptions

ON_EXISTING = ("resume", "restart", "error")
RECENT = 20  # steps whose mean loss is shown
# What says how to train and not what comes out, beyond rounding.
_HOW = {"steps", "save_every", "keep_last", "forward"}
_OPAQUE = {"dataset": "dataset", "model": "base model", "init_from": "adapter to start from"}


@dataclass(frozen=True)
class Job:
    """Everything a training run needs; None stands for the usual.

    Args:
        on_existing: one of ``ON_EXISTING``. chunk: steps of one execution, 0 for all.
        checkpointing, offload_activations, streaming, compile, compute: as the session has them.
        trackers: "none", "tensorboard" or "wandb".
    """

    model: Any
    dataset: TrainDataset
    run: TrainRun
    config: TrainConfig
    on_existing: str = "resume"
    checkpointing: str = "auto"
    adapter: AdapterConfig | None = None
    targets: Targets | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    preview: PreviewConfig | None = None
    validation: TrainDataset | None = None
    init_from: Adapter | None = None
    ema_tracking: bool = True
    clip: Any = None
    chunk: int = 0
    offload_activations: bool = False
    streaming: str = "auto"
    compile: bool = False
    compute: str = "auto"
    trackers: str = "none"

    def __post_init__(self) -> None:
        require_choice("on_existing", self.on_existing, ON_EXISTING)
        require_range("chunk", self.chunk, 0)
        if self.chunk and self.on_existing != "resume":
            does = {"restart": "begin anew with each chunk", "error": "refuse the second chunk"}
            raise AdapterLabError(
                "Training in chunks has to resume the run",
                found=f"'chunk' with 'on_existing' {self.on_existing}, which would "
                f"{does[self.on_existing]}",
                fix="Set 'on_existing' to resume, and choose a new run name to begin anew",
            )

    def session(self) -> SessionOptions:
        """How the model is to be run."""
        largest: tuple[int, ...] = max(self.dataset.buckets, key=math.prod)
        options: dict[str, Any] = {
            "checkpointing": self.checkpointing,
            "streaming": self.streaming,
            "compute": self.compute,
            "forward": (self.adapter or AdapterConfig()).forward,
        }
        return SessionOptions(
            offload=self.offload_activations,
            compile=self.compile,
            seed=self.config.seed,
            latent=(self.config.batch_size, *largest),
            **options,
        )

    def with_clip(self, clip: Any) -> Job:
        """The same on another CLIP."""
        return replace(self, clip=clip)

    def settings(self) -> dict[str, Any]:
        """Everything it is told, as JSON values; of the sockets' data a fingerprint."""
        return plain(
            {
                "steps": self.config.steps,
                **self.inputs(),
                "save_every": self.config.save_every,
                "keep_last": self.config.keep_last,
                "on_existing": self.on_existing,
                "ema_tracking": self.ema_tracking,
                "validation": self.validation.fingerprint if self.validation else None,
                "preview": _told(self.preview) if self.preview else None,
                "chunk": self.chunk,
                "checkpointing": self.checkpointing,
                "offload_activations": self.offload_activations,
                "streaming": self.streaming,
                "compile": self.compile,
                "trackers": self.trackers,
            }
        )

    def inputs(self) -> dict[str, Any]:
        """What the trained adapter depends on, besides the number of steps."""
        numbers = {k: v for k, v in asdict(self.config).items() if k not in _HOW}
        targets = _told(self.targets or Targets())
        return plain(
            {
                **numbers,
                "model": fingerprint(self.model),
                "dataset": self.dataset.fingerprint,
                "dataset_name": self.dataset.name,
                "init_from": tensor_fingerprint(self.init_from) if self.init_from else None,
                "adapter": asdict(self.adapter or AdapterConfig()),
                "targets": targets,
                "optimizer": asdict(self.optimizer),
                "objective": asdict(self.objective),
                "compute": self.compute,
            }
        )

    def circumstances(self) -> dict[str, Any]:
        """:meth:`inputs` by one name each: what a resumed run may change, but not by mistake."""
        table = flat(self.inputs())
        ignored = ("dataset_name", "adapter.forward")
        return {key: value for key, value in table.items() if key not in ignored}


@dataclass(frozen=True)
class Result:
    """What a run gives: the adapter, how it went, and what to tell the user.

    Attributes:
        previews: (step, images as ComfyUI's client finds them).
        rates: learning rate of each step that the record knows.
        continues: a chunk has ended and more steps are left.
    """

    adapter: Adapter
    progress: Progress
    report: str
    model: Any
    clip: Any = None
    previews: Sequence[tuple[int, Any]] = ()
    rates: Sequence[float] = ()
    continues: bool = False


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Circumstance -> (value before, value now) of what differs."""
    keys = [*before, *(key for key in now if key not in before)]
    return {k: (before.get(k), now.get(k)) for k in keys if before.get(k) != now.get(k)}


def told(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Changes in words: "another dataset, optimizer.learning_rate 0.0001 -> 0.001"."""
    return ", ".join(
        f"another {_OPAQUE[key]}" if key in _OPAQUE else f"{key} {_short(old)} -> {_short(new)}"
        for key, (old, new) in changed.items()
    )


def require_unchanged(job: Job, changed: Mapping[str, tuple[Any, Any]], step: int) -> None:
    """A finished run is the answer only to what it was asked.

    Raises:
        AdapterLabError: it was trained with other inputs.
    """
    if changed:
        raise AdapterLabError(
            f"The run '{job.run.name}' is finished, but was trained with other inputs",
            found=told(changed),
            expected="those of this graph",
            fix=f"Choose another run name, set 'on_existing' to restart, or set 'steps' above "
            f"{step} to train on with them",
        )


def text(
    job: Job,
    adapters: Mapping[str, Algorithm],
    progress: Progress,
    start: int,
    seconds: float,
    notes: Sequence[str],
) -> str:
    """The report of an execution that began at ``start`` and took ``seconds`` a step."""
    count = sum(t.numel() for a in adapters.values() for t in a.trained.values())
    resumed = f" (resumed at {start})" if start else ""
    lines = [f"{len(adapters)} modules, {count:,} parameters, {progress.step} steps{resumed}"]
    if progress.step < job.config.steps:
        left = job.config.steps - progress.step
        lines.append(f"chunk done, {left} step{'s' * (left > 1)} left: queue again to go on")
    lines += [f"Note: {note}" for note in notes]
    losses, validation = progress.losses, progress.validation
    if losses:
        first, last = mean(losses[:RECENT]), mean(losses[-RECENT:])
        lines.append(f"training loss {first:.4f} -> {last:.4f}")
    if validation:
        lines.append(f"held-out loss {validation[0][1]:.4f} -> {validation[-1][1]:.4f}")
    if progress.step > start:
        lines.append(f"{seconds:.3f} s/step")
    files = [path.name for _, path in job.run.checkpoints()]
    return "\n".join([*lines, f"adapter files: {len(files)}, the last is {files[-1]}"])


def mean(values: Sequence[float]) -> float:
    """Of some."""
    return sum(values) / len(values)


def _told(config: Any) -> dict[str, Any]:
    """A config's plain values; of conditioning and models only whether there are any."""
    found = ((f.name, getattr(config, f.name)) for f in fields(config))
    known = (str, int, float, tuple, type(None))
    return {name: v if isinstance(v, known) else type(v).__name__ for name, v in found}


def _short(value: Any) -> str:
    shown = "none" if value in (None, "", []) else str(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
