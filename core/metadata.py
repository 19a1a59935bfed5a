"""Metadata of a trained adapter, as sd-scripts spells it: what A1111, Forge and managers read.

Reference: kohya-ss/sd-scripts 48d368fa, ``train_network.py`` and ``library/sai_model_spec.py``
(ModelSpec 1.0.1); for Wan kohya-ss/musubi-tuner 30c658c, ``utils/sai_model_spec.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

_IMPLEMENTATIONS = {
    "stable-diffusion-v1": "diffusers",
    "stable-diffusion-xl-v1-base": "https://github.com/Stability-AI/generative-models",
    "flux-1-dev": "https://github.com/black-forest-labs/flux",
    "flux-1-schnell": "https://github.com/black-forest-labs/flux",
    "wan2.1": "https://github.com/Wan-Video/Wan2.1",
}
SOFTWARE = "Adapter Lab"
# Under ai-toolkit's key for what trained a file.
SIGNATURE = {"software": json.dumps({"name": SOFTWARE})}
_COMFYUI = "https://github.com/comfyanonymous/ComfyUI"


@dataclass(frozen=True)
class TrainingInfo:
    """What is known of a training run when an adapter of it is saved.

    Args:
        base_version: ``ss_base_model_version``: sd_v1, sdxl_base_v1-0, flux1, wan.
        architecture: ModelSpec's name without "/lora": stable-diffusion-v1, flux-1-dev, wan2.1.
        network_module: networks.lora, lycoris.kohya, ...; network_args: such as {"algo": "loha"}.
        steps: optimiser steps done, of ``max_steps``.
        optimizer: dotted class name, such as torch.optim.adamw.AdamW; with its arguments.
        items: pictures that an epoch visits, as often as they repeat; regularisation: those of it.
        batches: of an epoch, 0 for ``items`` over ``batch_size``.
        resolution: (width, height) in pixels of the trained items.
        started, finished: Unix time, seconds.
        prediction: "epsilon", "v" or "flow"; ModelSpec has no word for the last.
        extra: further keys; they win, values are written as ``str`` writes them.
    """

    base_version: str
    architecture: str
    output_name: str
    network_module: str
    network_dim: int
    network_alpha: float
    steps: int
    max_steps: int
    seed: int
    learning_rate: float
    optimizer: str
    items: int
    resolution: tuple[int, int]
    started: float
    finished: float
    network_args: Mapping[str, object] = field(default_factory=dict[str, object])
    optimizer_args: Mapping[str, object] = field(default_factory=dict[str, object])
    lr_scheduler: str = "constant"
    batch_size: int = 1
    accumulation: int = 1
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    model_name: str = ""
    comment: str = ""
    prediction: str = ""
    regularisation: int = 0
    batches: int = 0
    extra: Mapping[str, object] = field(default_factory=dict[str, object])


def training_metadata(info: TrainingInfo) -> dict[str, str]:
    """``ss_*``, ``modelspec.*`` and software entries for an adapter of the run ``info``; all text.

    What is not known (empty) is left out. The hashes are added by the writer of the file.
    """
    entries = {**_network(info), **_run(info), **_modelspec(info), **info.extra, **SIGNATURE}
    return {key: str(value) for key, value in entries.items() if value not in ("", None)}


def _network(info: TrainingInfo) -> dict[str, object]:
    args = {key: str(value) for key, value in info.network_args.items()}
    return {
        "ss_v2": False,
        "ss_base_model_version": info.base_version,
        "ss_network_module": info.network_module,
        "ss_network_dim": info.network_dim,
        "ss_network_alpha": float(info.network_alpha),
        "ss_network_args": json.dumps(args) if args else "",
    }


def _run(info: TrainingInfo) -> dict[str, object]:
    batches = info.batches or max(1, math.ceil(info.items / info.batch_size))
    steps_per_epoch = max(1, math.ceil(batches / info.accumulation))
    arguments = ",".join(f"{key}={value}" for key, value in info.optimizer_args.items())
    return {
        "ss_output_name": info.output_name,
        "ss_sd_model_name": info.model_name,
        "ss_training_started_at": float(info.started),
        "ss_training_finished_at": float(info.finished),
        "ss_training_comment": info.comment,
        "ss_learning_rate": float(info.learning_rate),
        "ss_unet_lr": float(info.learning_rate),
        "ss_lr_scheduler": info.lr_scheduler,
        "ss_optimizer": info.optimizer + (f"({arguments})" if arguments else ""),
        "ss_max_grad_norm": float(info.max_grad_norm),
        "ss_mixed_precision": info.mixed_precision,
        "ss_seed": info.seed,
        "ss_steps": info.steps,
        "ss_max_train_steps": info.max_steps,
        "ss_epoch": math.ceil(info.steps / steps_per_epoch),
        "ss_num_epochs": math.ceil(info.max_steps / steps_per_epoch),
        "ss_num_batches_per_epoch": batches,
        "ss_num_train_images": info.items - info.regularisation,  # sd-scripts
        "ss_num_reg_images": info.regularisation,
        "ss_num_train_items": info.items,  # musubi-tuner
        "ss_batch_size_per_device": info.batch_size,
        "ss_total_batch_size": info.batch_size * info.accumulation,
        "ss_gradient_accumulation_steps": info.accumulation,
        "ss_resolution": tuple(info.resolution),
    }


def _modelspec(info: TrainingInfo) -> dict[str, object]:
    width, height = info.resolution
    finished = datetime.fromtimestamp(int(info.finished))  # local time, as sd-scripts writes it
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{info.architecture}/lora" if info.architecture else "",
        "modelspec.implementation": _IMPLEMENTATIONS.get(info.architecture, _COMFYUI),
        "modelspec.title": info.output_name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": finished.isoformat(),
        "modelspec.prediction_type": info.prediction if info.prediction in ("epsilon", "v") else "",
    }
