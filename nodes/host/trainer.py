"""A training job on a ComfyUI model: from its settings to files that load."""

from __future__ import annotations

import time
import zlib
from typing import Any

import comfy.model_management
import torch

from ...core.adapters import ALGORITHMS, AdapterConfig, Algorithm
from ...core.errors import AdapterLabError
from ...core.files import Adapter, write_adapter
from ...core.keys import resolve
from ...core.train import snapshot
from ...core.train.loop import Progress, make_optimizer, train, validate
from ...core.train.random import generator
from ...core.train.targets import Targets
from .job import Job, Pace, Result, line, metadata, text
from .model import DIFFUSION, architecture, require_fit, shapes
from .process import HostProcess
from .progress import Bar
from .session import Session, blocks, layers


class Trainer:
    """One job in execution."""

    def __init__(self, job: Job, node_id: str | None = None) -> None:
        self.job = job
        self.arch = architecture(job.model)
        self.bar = Bar(job.config.steps, node_id)
        self.notes: list[str] = []

    @torch.inference_mode(False)
    def run(self) -> Result:
        """Train, or resume, to the last step.

        Whatever ends it early (cancel, an error, no memory), the state after the last completed
        step is on disk before the exception goes on.
        """
        job = self.job
        self._refuse_existing()
        self.adapters = self._adapters()
        self.optimizer = make_optimizer(self.adapters, job.optimizer)
        self.progress = self._restore()
        self.pace, self.saved_at = Pace(self.progress.step, time.time()), self.progress.step
        if self.progress.step < job.config.steps:
            self._train()
            # Only now nothing of the model is held here any more.
            comfy.model_management.soft_empty_cache()
        elif self.progress.step > job.config.steps:
            self.notes.append(f"the run has more steps than the {job.config.steps} asked for")
        if not job.run.checkpoint(self.progress.step).exists():
            self._save()
        report = text(job, self.adapters, self.progress, self.pace, self.notes)
        return Result(self._adapter(), self.progress, report)

    def _train(self) -> None:
        job = self.job
        try:
            # Loading a model patches it in place, which its inference tensors allow only there.
            with (
                torch.inference_mode(),
                Session(job.model, self.adapters, self._blocks()) as session,
            ):
                process = HostProcess(session)
                process.check([*job.dataset, *(job.validation or ())])
                job.run.require_space()
                # Not before everything that can be wrong was seen to be right.
                if job.on_existing == "restart":
                    job.run.clear()
                if not self.progress.validation:
                    self.bar.say("measuring the loss before training" if job.validation else "")
                    self._validate(process)
                self.pace.since = time.time()

                def on_step(progress: Progress) -> None:
                    if progress.step == self.pace.start + 1:
                        self._note_idle_modules()
                    if job.config.saves_at(progress.step):
                        self._validate(process)
                        self._save()
                    self.bar.update(progress.step, line(job, progress, self.pace))

                train(
                    process, self.adapters, job.dataset, job.config,
                    self.optimizer, job.optimizer, self.progress, on_step,
                )  # fmt: skip
        finally:
            # BaseException too: ComfyUI cancels with one.
            if self.progress.step > self.saved_at:
                self._save()

    def _note_idle_modules(self) -> None:
        """After a step every factor that has a part in the computation has a gradient."""
        idle = [
            name
            for name, algorithm in self.adapters.items()
            if all(factor.grad is None for factor in algorithm.tensors.values())
        ]
        if idle:
            self.notes.append(
                f"{len(idle)} modules take no part in the computation and learn nothing: "
                f"{', '.join(idle[:3])}{' ...' if len(idle) > 3 else ''}"
            )

    def _validate(self, process: HostProcess) -> None:
        if self.job.validation is not None:
            loss = validate(process, self.job.validation, self.job.config.seed)
            self.progress.validation.append((self.progress.step, loss))

    def _save(self) -> None:
        run, state = self.job.run, (self._identity(), self._circumstances())
        snapshot.save(run.state, self.adapters, self.optimizer, self.progress, *state)
        write_adapter(run.checkpoint(self.progress.step), self._adapter())
        self.saved_at = self.progress.step
        run.prune(self.job.config.keep_last)

    def _refuse_existing(self) -> None:
        run, choice = self.job.run, self.job.on_existing
        if not run.exists or choice == "restart":
            return
        if choice == "error":
            raise AdapterLabError(
                f"A run '{run.name}' exists already",
                fix="Choose another name, or set 'on_existing' to resume or restart",
            )
        if not run.state.exists():
            raise AdapterLabError(
                f"The run '{run.name}' cannot be resumed",
                found=f"adapter files in {run.adapters.name}, but no state",
                fix="Choose another name, or connect its last adapter to 'init_from'",
            )

    def _restore(self) -> Progress:
        if self.job.on_existing == "restart" or not self.job.run.state.exists():
            return Progress()
        state = (self._identity(), self._circumstances())
        progress, changed = snapshot.load(self.job.run.state, self.adapters, self.optimizer, *state)
        if changed and progress.step < self.job.config.steps:
            self.notes.append(f"resumed with another {', another '.join(changed)}")
        return progress

    def _identity(self) -> dict[str, Any]:
        """What factors and moments depend on."""
        return {
            "architecture": self.arch.id if self.arch else None,
            "optimizer": self.job.optimizer.optimizer,
            "module": {
                name: [a.name, a.scale, *(list(t.shape) for t in a.tensors.values())]
                for name, a in self.adapters.items()
            },
        }

    def _circumstances(self) -> dict[str, Any]:
        """What a resumed run may change, but not by mistake."""
        items = [(item.caption, item.latent.flatten()[:4].tolist()) for item in self.job.dataset]
        return {
            "dataset": zlib.crc32(str(items).encode()),
            "seed": self.job.config.seed,
            "batch size": [self.job.config.batch_size, self.job.config.accumulation],
        }

    def _adapters(self) -> dict[str, Algorithm]:
        """Fresh or given adapters by module name, their factors as float32 leaves on the device."""
        adapters = self._fresh() if self.job.init_from is None else self._given(self.job.init_from)
        for algorithm in adapters.values():
            for suffix, factor in algorithm.tensors.items():
                leaf = factor.to(self.job.model.load_device, torch.float32, copy=True)
                algorithm.tensors[suffix] = leaf.requires_grad_()
        return adapters

    def _fresh(self) -> dict[str, Algorithm]:
        config = self.job.adapter or AdapterConfig()
        algorithm, weights = ALGORITHMS[config.algorithm], shapes(self.job.model.model)
        return {
            name: algorithm.init(
                weights[f"{DIFFUSION}{name}.weight"],
                config,
                generator(self.job.config.seed, f"init {name}"),
            )
            for name in self._chosen()
        }

    def _chosen(self) -> list[str]:
        return (self.job.targets or Targets()).select(layers(self.job.model), self.arch)

    def _given(self, adapter: Adapter) -> dict[str, Algorithm]:
        """The modules of an adapter to go on from; they decide what is trained."""
        entries, report = resolve(adapter, shapes(self.job.model.model))
        require_fit(report, "Only an adapter of which everything fits can be trained on")
        given = {e.path: e.algorithm for e in entries if e.slice is None and e.part == "model"}
        if len(given) < len(entries) or not given.keys() <= layers(self.job.model).keys():
            raise AdapterLabError(
                "Training cannot go on from this adapter",
                found="modules on parts of fused weights, in the text encoder or two on a layer",
                expected="one module for each layer of the diffusion model",
            )
        config = self.job.adapter
        kinds = {(a.name, a.rank) for a in given.values()}
        if config is not None and kinds != {(config.algorithm, config.rank)}:
            self.notes.append("algorithm and rank are those of 'init_from', not of 'config'")
        if self.job.targets is not None and set(self._chosen()) != given.keys():
            self.notes.append("the modules are those of 'init_from', not of 'targets'")
        return given

    def _blocks(self) -> list[str]:
        choice, on_cpu = self.job.checkpointing, self.job.model.load_device.type == "cpu"
        if choice == "off" or (choice == "auto" and (on_cpu or self.arch is None)):
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
        tensors = {
            f"{DIFFUSION}{name}.{suffix}": tensor.detach().to("cpu", copy=True)
            for name, algorithm in self.adapters.items()
            for suffix, tensor in algorithm.state().items()
        }
        described = metadata(self.job, self.arch, self.adapters, self.progress, self.pace.since)
        return Adapter(tensors, described, name=self.job.run.name)
