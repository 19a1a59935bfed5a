"""The scripts of a checkout of musubi-tuner, which is on the path, for ``child.py``."""

from __future__ import annotations

from musubi_tuner import convert_lora, lora_post_hoc_ema
from musubi_tuner.modules.fp8_optimization_utils import load_safetensors_with_fp8_optimization
from musubi_tuner.utils.safetensors_utils import mem_eff_save_file


def start() -> None:
    """Nothing is held before the first call."""


def ema(paths: list[str], out: str) -> None:
    lora_post_hoc_ema.merge_lora_weights_with_post_hoc_ema(list(paths), True, 0.95, 0.95, 0.2, out)


def convert(path: str, out: str, form: str) -> None:
    target = {"diffusers": "other"}[form]
    convert_lora.convert(path, out, target, "transformer")


def quantize(model: str, out: str, form: str) -> None:
    """Its nearest to ours: fp8 with one scale, and with one a row. Then saved by its own writer."""
    mode = {"fp8_e4m3": "tensor", "int8_row": "channel", "int8_convrot": "channel"}[form]
    state = load_safetensors_with_fp8_optimization(
        [model], "cpu", ["blocks"], ["norm", "head"], quantization_mode=mode
    )
    mem_eff_save_file(state, out)
