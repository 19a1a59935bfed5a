"""A training job on a ComfyUI model: from its settings to files that load."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...core.adapters import ALGORITHMS, AdapterConfig, Algorithm
from ...core.errors import AdapterLabError
from ...core.files import Adapter, read_adapter, write_adapter
from ...core.keys import resolve
from ...core.metadata import TrainingInfo, training_metadata
from ...core.train import snapshot
from ...core.train.checkpoints import TrainRun
from ...core.train.config import OptimizerConfig, TrainConfig
from ...core.train.data import TrainDataset
from ...core.train.loop import Progress, make_optimizer, train, validate
from ...core.train.random import generator
from ...core.train.targets import Targets
from .model import DIFFUSION, architecture, require_fit, shapes
from .process import HostProcess
from .progress import Bar
from .session import Session, blocks, layers

_PREDICTIONS = {"EPS": "epsilon", "V_PREDICTION": "v", "V_PREDICTION_EDM": "v"}


@dataclass(frozen=True)
class Job:
    """Everything a training run needs."""

    model: Any
    dataset: TrainDataset
    run: TrainRun
    config: TrainConfig
    on_existing: str = "resume"
    checkpointing: str = "auto"
    adapter: AdapterConfig = AdapterConfig()
    targets: Targets = Targets()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: TrainDataset | None = None
    init_from: Adapter | None = None


@dataclass(frozen=True)
class Result:
    """What a run gives: the adapter, how it went, and where it is."""

    adapter: Adapter
    progress: Progress
    report: str


class Trainer:
    """One job in execution."""

    def __init__(self, job: Job, node_id: str | None = None) -> None:
        self.job = job
        self.arch = architecture(job.model)
        self.bar = Bar(job.config.steps, node_id)
        self.started = time.time()
        self.resumed_at = self.saved_at = 0

    @torch.inference_mode(False)
    def run(self) -> Result:
        """Train, or resume, to the last step.

        Whatever ends it early (cancel, an error, no memory), the state after the last completed
        step is on disk before the exception goes on.
        """
        self._settle_existing()
        self.adapters = self._adapters()
        self.optimizer = make_optimizer(self.adapters, self.job.optimizer)
        self.progress = self._restore()
        self.resumed_at = self.saved_at = self.progress.step
        if self.progress.step < self.job.config.steps:
            self._train()
        return Result(self._adapter(), self.progress, self._text())

    def _train(self) -> None:
        job = self.job
        try:
            # Loading a model patches it in place, which its inference tensors allow only there.
            with (
                torch.inference_mode(),
                Session(job.model, self.adapters, self._blocks()) as session,
            ):
                self.process = HostProcess(session)
                self.process.check([*job.dataset, *(job.validation or ())])
                self.bar.say("measuring the loss before training" if job.validation else "")
                if not self.progress.validation:
                    self._validate()
                self.started = time.time()
                train(
                    self.process, self.adapters, job.dataset, job.config,
                    self.optimizer, job.optimizer, self.progress, self._on_step,
                )  # fmt: skip
        finally:
            # BaseException too: ComfyUI cancels with one.
            if self.progress.step > self.saved_at:
                self._save()
            comfy.model_management.soft_empty_cache()

    def _on_step(self, progress: Progress) -> None:
        if self.job.config.saves_at(progress.step):
            self._validate()
            self._save()
        self.bar.update(progress.step, self._line())

    def _validate(self) -> None:
        if self.job.validation is not None:
            loss = validate(self.process, self.job.validation, self.job.config.seed)
            self.progress.validation.append((self.progress.step, loss))

    def _save(self) -> None:
        run = self.job.run
        snapshot.save(run.state, self.adapters, self.optimizer, self.progress, self._identity())
        write_adapter(run.checkpoint(self.progress.step), self._adapter())
        self.saved_at = self.progress.step
        run.prune(self.job.config.keep_last)

    def _settle_existing(self) -> None:
        run, choice = self.job.run, self.job.on_existing
        if not run.state.exists():
            return
        if choice == "error":
            raise AdapterLabError(
                f"A run '{run.name}' exists already",
                fix="Choose another name, or set 'on_existing' to resume or restart",
            )
        if choice == "restart":
            run.clear()

    def _restore(self) -> Progress:
        if not self.job.run.state.exists():
            return Progress()
        return snapshot.load(self.job.run.state, self.adapters, self.optimizer, self._identity())

    def _identity(self) -> dict[str, Any]:
        """What factors and moments depend on; the rest may change when a run is resumed."""
        return {
            "architecture": self.arch.id if self.arch else None,
            "optimizer": self.job.optimizer.optimizer,
            "modules": {n: [a.name, a.rank, a.scale] for n, a in sorted(self.adapters.items())},
        }

    def _adapters(self) -> dict[str, Algorithm]:
        """Fresh or given adapters by module name, their factors as float32 leaves on the device."""
        job = self.job
        adapters = _given(job.model, job.init_from) if job.init_from else self._fresh()
        device = comfy.model_management.get_torch_device()
        for algorithm in adapters.values():
            for suffix, factor in algorithm.tensors.items():
                leaf = factor.to(device, torch.float32, copy=True).requires_grad_()
                algorithm.tensors[suffix] = leaf
        return adapters

    def _fresh(self) -> dict[str, Algorithm]:
        job, algorithm = self.job, ALGORITHMS[self.job.adapter.algorithm]
        weights = shapes(job.model.model)
        chosen = job.targets.select(layers(job.model), self.arch)
        return {
            name: algorithm.init(
                weights[f"{DIFFUSION}{name}.weight"],
                job.adapter,
                generator(job.config.seed, f"init {name}"),
            )
            for name in chosen
        }

    def _blocks(self) -> list[str]:
        choice, device = self.job.checkpointing, comfy.model_management.get_torch_device()
        if choice == "off" or (choice == "auto" and (device.type == "cpu" or self.arch is None)):
            return []
        if self.arch is None:
            raise AdapterLabError(
                "Checkpointing needs to know the model's blocks",
                found="an architecture that is not in the registry",
                fix="Set 'checkpointing' to off",
            )
        return blocks(self.job.model, self.arch)

    def _adapter(self) -> Adapter:
        """The adapter as it is now, on the CPU, in ComfyUI's spelling."""
        tensors: dict[str, Tensor] = {}
        for name, algorithm in self.adapters.items():
            for suffix, tensor in algorithm.state().items():
                value = tensor.detach().to("cpu", copy=True)
                tensors[f"{DIFFUSION}{name}.{suffix}"] = value
        adapter = Adapter(tensors)
        adapter.name = self.job.run.name
        adapter.metadata.update(self._metadata())
        return adapter

    def _metadata(self) -> dict[str, str]:
        """Metadata as sd-scripts spells it."""
        job, config, adapter = self.job, self.job.config, self.job.adapter
        first = next(iter(self.adapters.values()))
        is_lora = first.name == "lora"
        scale = job.model.get_model_object("latent_format").spacial_downscale_ratio
        height, width = (n * scale for n in max(job.dataset.buckets)[-2:])
        info = TrainingInfo(
            base_version=self.arch.base_versions[0] if self.arch else "",
            architecture=self.arch.modelspec[0] if self.arch else "",
            output_name=job.run.name,
            network_module="networks.lora" if is_lora else "lycoris.kohya",
            network_dim=first.rank,
            network_alpha=first.alpha,
            network_args={} if is_lora else {"algo": first.name, "factor": adapter.factor},
            steps=self.progress.step,
            max_steps=config.steps,
            seed=config.seed,
            learning_rate=job.optimizer.learning_rate,
            optimizer="torch.optim.adamw.AdamW",
            optimizer_args={"weight_decay": job.optimizer.weight_decay},
            items=len(job.dataset),
            resolution=(width, height),
            started=self.started,
            finished=time.time(),
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            max_grad_norm=job.optimizer.clip,
            prediction=_PREDICTIONS.get(job.model.model.model_type.name, "flow"),
        )
        return training_metadata(info)

    def _line(self) -> str:
        progress, done = self.progress, self.progress.step - self.resumed_at
        pace = (time.time() - self.started) / max(1, done)
        left = int(pace * (self.job.config.steps - progress.step))
        recent = progress.losses[-20:]
        loss = sum(recent) / len(recent)
        held_out = f" · held-out {progress.validation[-1][1]:.4f}" if progress.validation else ""
        return (
            f"step {progress.step} of {self.job.config.steps} · loss {loss:.4f}{held_out}"
            f" · {pace:.2f} s/step · {left // 60}:{left % 60:02} left"
        )

    def _text(self) -> str:
        progress, trained = self.progress, self.progress.step - self.resumed_at
        count = sum(t.numel() for a in self.adapters.values() for t in a.tensors.values())
        lines = [
            f"{len(self.adapters)} modules, {count:,} parameters, {progress.step} steps"
            + (f" (resumed at {self.resumed_at})" if self.resumed_at else "")
        ]
        if progress.losses:
            first, last = _mean(progress.losses[:20]), _mean(progress.losses[-20:])
            lines.append(f"training loss {first:.4f} -> {last:.4f}")
        if progress.validation:
            (_, first), (_, last) = progress.validation[0], progress.validation[-1]
            lines.append(f"held-out loss {first:.4f} -> {last:.4f}")
        if trained:
            lines.append(f"{(time.time() - self.started) / trained:.3f} s/step")
        files = [path.name for _, path in self.job.run.checkpoints()]
        return "\n".join([*lines, f"{len(files)} adapter files, the last is {files[-1]}"])


def resume(run: TrainRun) -> Adapter:
    """The newest adapter of a run on disk."""
    files = run.checkpoints()
    if not files:
        raise AdapterLabError(f"The run '{run.name}' has no adapter file")
    return read_adapter(files[-1][1])


def _given(model: Any, adapter: Adapter) -> dict[str, Algorithm]:
    """Adapters to go on from, by module name inside the diffusion model."""
    entries, report = resolve(adapter, shapes(model.model))
    require_fit(report, complete=True)
    if any(e.slice is not None or not e.key.startswith(DIFFUSION) for e in entries):
        raise AdapterLabError(
            "Training cannot go on from this adapter",
            found="modules on parts of fused weights or in the text encoder",
            expected="one module for each weight of the diffusion model",
        )
    return {entry.path: entry.algorithm for entry in entries}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
