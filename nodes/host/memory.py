"""Where a model in training is kept, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management as management

from ...core.errors import AdapterLabError

# More than there is: everything else has to leave the device, activations need the room.
_ALL_MEMORY = 10**20
# Forward and backward of one block hold about so many times what ComfyUI estimates for a forward
# pass; the share of a device that is kept free where the size of the latents is not known.
_BACKWARD, _SHARE = 3, 0.25


def load(patchers: Sequence[Any], model: Any, streaming: str, latent: Sequence[int]) -> None:
    """Load the patchers with their patches on; ``model`` is the one that may be streamed.

    Streamed means that ComfyUI keeps weights in the memory of the CPU, as it does when a model
    does not fit for sampling, and each layer brings its own to the device for as long as it
    computes, in the backward pass once more. Nothing is written back: the weights are frozen.

    Args:
        streaming: "auto": what does not fit beside the activations. "on": all that can. "off".
        latent: (b, c, *space) of the largest batch; empty where it is not known.

    Raises:
        AdapterLabError: the model does not fit and may not be streamed.
    """
    needed = activations(model, latent)
    if model.is_dynamic():
        # Brings weights as they are needed by itself, and frees them for what needs the room.
        management.load_models_gpu(patchers, memory_required=needed)
    elif streaming == "on":
        management.load_models_gpu(patchers, memory_required=_ALL_MEMORY)
        model.partially_unload(model.offload_device, _ALL_MEMORY)
    elif streaming == "off" or _fits(patchers, model.load_device, needed):
        management.load_models_gpu(patchers, memory_required=_ALL_MEMORY, force_full_load=True)
    else:
        management.load_models_gpu(patchers, memory_required=needed)
    if streaming == "off":
        _require_loaded(model)


def activations(model: Any, latent: Sequence[int]) -> int:
    """Bytes that a step needs beside the weights, where blocks are checkpointed; an estimate."""
    if not latent:
        total: Any = management.get_total_memory(model.load_device)
        return int(_SHARE * total)
    return int(_BACKWARD * model.memory_required(list(latent)))


def keeps_too_much(model: Any, blocks: int, latent: Sequence[int]) -> bool:
    """Whether the activations of all blocks at once are most of the memory that is free."""
    if not latent:
        return False
    free: Any = management.get_free_memory(model.load_device)
    return blocks * activations(model, latent) > free / 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device or the CPU has no memory left."""
    # The allocator for the CPU raises a plain RuntimeError, whose further words are the system's.
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, MemoryError) or management.is_oom(error)


def _fits(patchers: Sequence[Any], device: Any, needed: int) -> bool:
    """Whether all of them fit beside ``needed`` bytes, by ComfyUI's own figures."""
    if device.type == "cpu":
        return True
    # What is there already stays: a preview ends with all of it loaded.
    loaded = management.current_loaded_models
    kept = [m for m in loaded if any(p.is_clone(m.model) for p in patchers)]
    management.free_memory(_ALL_MEMORY, device, keep_loaded=kept)
    free: Any = management.get_free_memory(device)
    here = [p for p in patchers if p.load_device == device]
    return sum(p.model_size() - p.loaded_size() for p in here) + needed < free


def _require_loaded(model: Any) -> None:
    here = model.load_device.type
    away = [name for name, p in model.model.named_parameters() if p.device.type != here]
    if away:
        raise AdapterLabError(
            "The model is not loaded completely",
            found=f"{len(away)} weights that are not on {model.load_device}",
            expected="memory for the whole model, and ComfyUI without --novram",
            fix="Set 'streaming' to auto, or use a smaller or quantised model",
        )
