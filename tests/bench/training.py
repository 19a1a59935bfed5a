"""Seconds per training step, beside ComfyUI's own trainer on the same model and data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import host
import samples
import tiny
import torch
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.train.checkpoints import TrainRun
from adapter_lab.core.train.config import OptimizerConfig, TrainConfig
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.targets import Targets
from adapter_lab.nodes.host.job import Job
from adapter_lab.nodes.host.latents import graph
from adapter_lab.nodes.host.trainer import Trainer
from comfy.sd import load_diffusion_model
from comfy_extras.nodes_train import TrainLoraNode

STEPS, PAIRS, RANK = 8, 5, 16
SIZES = {"flux": (16, 32, 32), "wan": (16, 1, 32, 32)}
_numbers = itertools.count()


def _dataset(kind: str) -> TrainDataset:
    rng = torch.Generator().manual_seed(0)
    return TrainDataset(
        [
            TrainItem(torch.randn(SIZES[kind], generator=rng), item.cond, item.extra)
            for item in samples.items(kind)
        ]
    )


def _per_step(train: Callable[[int], object]) -> Callable[[], float]:
    """Seconds of one step without what a run costs once: long run minus short run."""

    def run() -> float:
        seconds = []
        for steps in (1, STEPS + 1):
            start = time.perf_counter()
            train(steps)
            seconds.append(time.perf_counter() - start)
        return (seconds[1] - seconds[0]) / STEPS

    return run


def _ours(model, dataset: TrainDataset, preset: str, batch: int, checkpointing: str):
    def train(steps: int) -> None:
        name = f"bench{next(_numbers)}"
        run = TrainRun(name, host.FOLDER / name, host.FOLDER / name)
        config = TrainConfig(steps, batch, save_every=0)
        adapter = AdapterConfig("lora", RANK, RANK)
        job = Job(
            model, dataset, run, config, checkpointing=checkpointing, adapter=adapter,
            targets=Targets(preset), optimizer=OptimizerConfig(),
        )  # fmt: skip
        with torch.inference_mode():
            Trainer(job).run()

    return _per_step(train)


def _native(model, dataset: TrainDataset, batch: int):
    pairs = [graph(item) for item in dataset]
    latents, conds = [p[0] for p in pairs], [p[1] for p in pairs]

    def train(steps: int) -> None:
        options = dict(
            batch_size=batch, steps=steps, grad_accumulation_steps=1, learning_rate=1e-4,
            rank=RANK, optimizer="AdamW", loss_function="MSE", seed=0, training_dtype="fp32",
            lora_dtype="fp32", quantized_backward=False, algorithm="LoRA",
            gradient_checkpointing=True, checkpoint_depth=1, offloading=False,
            existing_lora="[None]", bucket_mode=False, bypass_mode=False,
        )  # fmt: skip
        lists = {name: [value] for name, value in options.items()}
        with torch.inference_mode():
            TrainLoraNode.execute(model=[model], latents=latents, positive=conds, **lists)

    return _per_step(train)


def _bench(kind: str, batch: int, preset: str, checkpointing: str) -> Callable[..., None]:
    def bench(measure: Callable[..., None]) -> None:
        with torch.inference_mode():
            model = load_diffusion_model(str(tiny.write(kind, host.FOLDER / f"{kind}.safetensors")))
        data = _dataset(kind)
        ours = _ours(model, data, preset, batch, checkpointing)
        peer = _native(model, data, batch)
        measure(ours, peer, "TrainLoraNode", "s/step", PAIRS)

    return bench


BENCHES = {
    f"train_{kind}_batch{batch}_{label}": _bench(kind, batch, preset, checkpointing)
    for kind in SIZES
    for batch in (1, 4)
    for label, preset, checkpointing in (
        ("default", "default", "auto"),
        ("everything_checkpointed", "everything", "blocks"),
    )
}
