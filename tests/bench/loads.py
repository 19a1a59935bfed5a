"""Model files loaded by ComfyUI, for ``child.py``."""

from __future__ import annotations

from typing import Any

import host  # noqa: F401  first, it sets ComfyUI up

import comfy.cli_args  # isort: skip
import comfy.model_management
import comfy.sd
import torch
from adapter_lab.core.merge.modules import quiet
from adapter_lab.core.quant import Settings
from adapter_lab.nodes.host import quantised
from comfy.quant_ops import QuantizedTensor

_PAGE = 4096  # bytes


def start() -> None:
    """Models stay in bf16, as on a GPU; without it ComfyUI widens them for a CPU."""
    comfy.cli_args.args.bf16_unet = True


def load(model: str, form: str = "") -> None:
    """A file by the loader of Load Diffusion Model, or by ours into ``form``; all of it is read."""
    with torch.inference_mode():
        if form:
            made = quantised.load(model, Settings(form), quiet)[0]
        else:
            made = comfy.sd.load_diffusion_model(model)
        for weight in made.model.parameters():
            _touch(weight)


def _touch(weight: Any) -> None:
    """Makes the system read what is mapped only."""
    plain = weight._qdata if isinstance(weight, QuantizedTensor) else weight.data
    plain.reshape(-1).view(torch.uint8)[::_PAGE].sum()
