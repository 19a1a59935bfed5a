"""What a format of quantised weights means on the device that ComfyUI computes on.

Reference: ComfyUI 0.30.0, ``comfy/ops.py`` (``pick_operations``, ``mixed_precision_ops``),
``comfy/quant_ops.py`` and ``comfy/model_management.py``; comfy-kitchen, ``tensor/int8.py``.
"""

from __future__ import annotations

import comfy.model_management as management
import torch

from ...core.quant.formats import Format

_MULTIPLIES = {
    "float8_e4m3fn": management.supports_fp8_compute,
    "mxfp8": management.supports_mxfp8_compute,
    "nvfp4": management.supports_nvfp4_compute,
}
_TURING = (7, 5)  # compute capability from which on tensor cores multiply int8
_SAVES = "saves memory, not time"
_ROUNDED = "with activations rounded for each use"
# ComfyUI scales what it rounds to the others; to fp8 by an input scale, which no weight tells.
_CUT = {"float8_e4m3fn": " and cut at 448"}
_INTEGER = f"multiplied in int8, {_ROUNDED}"
_UNTOUCHED = "; full_precision does not change that, ComfyUI has no other way for int8"


def quantising() -> torch.device:
    """The device to quantise on: the GPU where it is CUDA's or ROCm's, else the processor."""
    device = management.get_torch_device()
    return device if device.type == "cuda" else torch.device("cpu")


def told(form: Format, full_precision: bool) -> tuple[str, str]:
    """(name, value) of a fact of a format: how this device computes with it."""
    device = management.get_torch_device()
    if not form.dequantises:
        here = _integer(device) + _UNTOUCHED * full_precision
    elif full_precision:
        here = f"dequantised for each use, as full_precision asks; {_SAVES}"
    elif _MULTIPLIES[form.native](device):
        cut = _CUT.get(form.native, "")
        here = f"multiplied in {form.native}, {_ROUNDED}{cut}; full_precision avoids that"
    else:
        here = f"dequantised for each use; {_SAVES}"
    return f"on this machine ({_name(device)})", here


def _integer(device: torch.device) -> str:
    """ComfyUI multiplies int8 as such on any device."""
    if device.type == "cpu":
        return f"{_INTEGER}; {_SAVES}"
    if not management.is_nvidia():
        return f"{_INTEGER}; how fast depends on comfy-kitchen's support for this GPU"
    if torch.cuda.get_device_capability(device) < _TURING:
        return f"{_INTEGER}; this GPU has no tensor cores for it, choose fp8_e4m3 if it fails"
    return _INTEGER


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
