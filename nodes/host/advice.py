"""What to do where a model in training does not fit into memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import comfy.model_management

from ...core.adapters import AdapterConfig
from ...core.errors import AdapterLabError
from .job import Job

_MOST = 3


def _on_gpu(job: Job) -> bool:
    return job.model.load_device.type != "cpu"


def _large_state(job: Job) -> bool:
    return job.optimizer.optimizer in ("AdamW", "Adan", "AdEMAMix", "Prodigy")


# The settings that help, those that help most first: (where it applies, what to do).
_HELP: tuple[tuple[Callable[[Job], bool], str], ...] = (
    (lambda job: job.checkpointing == "off", "Set 'checkpointing' to blocks"),
    (
        lambda job: job.config.batch_size > 1,
        "Lower 'batch_size' to 1 and raise 'accumulation' instead",
    ),
    (
        lambda job: not _on_gpu(job) and job.checkpointing == "auto",
        "Set 'checkpointing' to blocks",
    ),
    (lambda job: _on_gpu(job) and job.streaming != "on", "Set 'streaming' to on"),
    (
        lambda job: _on_gpu(job) and not job.offload_activations,
        "Switch 'offload_activations' on",
    ),
    (lambda job: job.compute == "fp32", "Set 'compute' to bf16"),
    (_large_state, "Choose the optimizer AdamW8bit or Adafactor"),
    (
        lambda job: (job.adapter or AdapterConfig()).rank > 8,
        "Lower 'rank', or train fewer modules with Training Targets",
    ),
    (lambda job: True, "Train on smaller pictures or shorter clips"),
    (lambda job: True, "Load the model in fp8, with Load Diffusion Model's weight_dtype"),
    (lambda job: True, "Train fewer modules with Training Targets"),
)


def out_of_memory(job: Job, step: int, error: BaseException) -> AdapterLabError:
    """The error for a user whose memory ran out in ``step``, with what helps most as things are
    set now. Lets go of what the failed step held."""
    traceback.clear_frames(error.__traceback__)
    comfy.model_management.soft_empty_cache()
    fitting = [advice for applies, advice in _HELP if applies(job)]
    advice = ". ".join(dict.fromkeys(fitting[:_MOST]))
    return AdapterLabError(
        f"Out of memory in step {step}", found=str(error).split("\n")[0][:300], fix=f"{advice}."
    )
