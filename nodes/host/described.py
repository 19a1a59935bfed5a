"""The metadata of a job's adapter files."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...core.adapters import AdapterConfig, Algorithm
from ...core.archs import ArchSpec
from ...core.metadata import TrainingInfo, training_metadata
from ...core.train.config import OptimizerConfig
from ...core.train.kohya import network, objective_entries
from ...core.train.progress import Progress
from .job import Job

_PRECISIONS = {"auto": "no", "fp32": "no"}
_PREDICTIONS = {"EPS": "epsilon", "V_PREDICTION": "v", "V_PREDICTION_EDM": "v"}


def metadata(
    job: Job,
    arch: ArchSpec | None,
    adapters: Mapping[str, Algorithm],
    progress: Progress,
    started: float,
) -> dict[str, str]:
    """Metadata of the adapter file, as sd-scripts spells it.

    Args:
        started: when the run began, Unix time.
    """
    chosen = _chosen(job, next(iter(adapters.values())))
    info = TrainingInfo(
        base_version=next(iter(arch.base_versions), "") if arch else "",
        architecture=next(iter(arch.modelspec), "") if arch else "",
        output_name=job.run.name,
        steps=progress.step,
        max_steps=job.config.steps,
        seed=job.config.seed,
        resolution=_resolution(job),
        started=started,
        finished=time.time(),
        batch_size=job.config.batch_size,
        accumulation=job.config.accumulation,
        mixed_precision=_PRECISIONS.get(job.compute, job.compute),
        prediction=_PREDICTIONS.get(job.model.model.model_type.name, "flow"),
        extra=_more(job, chosen, adapters),
        **_data(job),
        **_network(chosen, adapters),
        **_optimizer(job.optimizer),
    )
    return training_metadata(info)


def _data(job: Job) -> dict[str, Any]:
    """The entries of an epoch."""
    visits = Counter[bool]()
    for item in job.dataset:
        visits[item.regularisation] += item.repeats
    return {
        "items": visits.total(),
        "regularisation": visits[True],
        "batches": sum(job.dataset.batches(job.config.batch_size)),
    }


def _resolution(job: Job) -> tuple[int, int]:
    """Width and height in pixels of the largest items."""
    scale = job.model.get_model_object("latent_format").spacial_downscale_ratio
    height, width = (n * scale for n in max(job.dataset.buckets, key=math.prod)[-2:])
    return width, height


def _network(chosen: AdapterConfig, adapters: Mapping[str, Algorithm]) -> dict[str, Any]:
    """The entries of what is trained; sizes are those of the first module."""
    first = next(iter(adapters.values()))
    wrapped = {trait for a in adapters.values() for trait in a.traits}
    module, arguments = network(chosen, first.name, dora="DoRA" in wrapped)
    return {
        "network_module": module,
        "network_dim": first.rank,
        "network_alpha": first.alpha,
        "network_args": arguments,
    }


def _chosen(job: Job, first: Algorithm) -> AdapterConfig:
    """What was asked for; of an adapter to start from the modules decide."""
    if job.init_from is None:
        return job.adapter or AdapterConfig()
    return AdapterConfig(first.name, max(1, first.rank), max(0.0, first.alpha))


def _more(job: Job, chosen: AdapterConfig, adapters: Mapping[str, Algorithm]) -> dict[str, object]:
    return {
        "ss_lr_warmup_steps": job.optimizer.warmup,
        "ss_gradient_checkpointing": job.checkpointing != "off",
        "ss_text_encoder_lr": _encoder_rate(job, adapters),
        "ss_network_dropout": chosen.dropout or "",
        **objective_entries(job.objective),
    }


def _optimizer(config: OptimizerConfig) -> dict[str, Any]:
    """The entries of how it is trained: dotted name of the class, its settings."""
    kind, betas = config.row.resolve(), config.parsed_betas()
    settings: dict[str, object] = {"weight_decay": config.weight_decay}
    settings |= {"betas": betas} if betas else {}
    return {
        "learning_rate": config.learning_rate,
        "optimizer": f"{kind.__module__}.{getattr(kind, '__qualname__', '')}",
        "optimizer_args": settings | config.parsed_arguments(),
        "lr_scheduler": config.schedule,
        "max_grad_norm": config.clip,
    }


def _encoder_rate(job: Job, adapters: Mapping[str, Algorithm]) -> object:
    """ "" where no text encoder is trained."""
    if all(name.startswith("diffusion_model.") for name in adapters):
        return ""
    return job.optimizer.text_encoder_rate or job.optimizer.learning_rate
