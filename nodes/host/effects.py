"""Settings that are without effect in a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .job import Job
from .text import is_trained


def _on_cpu(job: Job) -> bool:
    return job.model.load_device.type == "cpu"


def _trains_model_alone(job: Job) -> bool:
    return job.init_from is not None or job.targets is None or job.targets.train == "model"


# (where it applies, given whether a text encoder is trained; what to say)
_IDLE: tuple[tuple[Callable[[Job, bool], bool], str], ...] = (
    (
        lambda job, text: job.optimizer.warmup > job.config.steps,
        "'warmup' is longer than the run: the learning rate never reaches its full height",
    ),
    (
        lambda job, text: job.optimizer.text_encoder_rate > 0 and not text,
        "'text_encoder_rate' has no effect: no text encoder is trained",
    ),
    (
        lambda job, text: job.clip is not None and not text and _trains_model_alone(job),
        "'clip' is not trained: the modules to train are of the model alone",
    ),
    (
        lambda job, text: job.offload_activations and _on_cpu(job),
        "'offload_activations' has no effect on a CPU",
    ),
    (
        lambda job, text: job.offload_activations and not _on_cpu(job)
        and job.checkpointing == "off",
        "'offload_activations' has no effect while 'checkpointing' is off",
    ),
    (
        lambda job, text: job.streaming == "on" and _on_cpu(job),
        "'streaming' saves no memory on a CPU",
    ),
    (
        lambda job, text: job.config.keep_last > 0 and job.config.save_every == 0,
        "'keep_last' has no effect while 'save_every' is 0",
    ),
)  # fmt: skip


def idle(job: Job, paths: Iterable[str]) -> list[str]:
    """A sentence for each setting that does nothing where the modules at ``paths`` are trained."""
    text = is_trained(paths)
    return [said for applies, said in _IDLE if applies(job, text)]
