"""The scripts of a checkout of musubi-tuner, which is on the path, for ``child.py``."""

from __future__ import annotations

from musubi_tuner import convert_lora, lora_post_hoc_ema


def start() -> None:
    """Nothing is held before the first call."""


def ema(paths: list[str], out: str) -> None:
    lora_post_hoc_ema.merge_lora_weights_with_post_hoc_ema(list(paths), True, 0.95, 0.95, 0.2, out)


def convert(path: str, out: str, form: str) -> None:
    target = {"diffusers": "other"}[form]
    convert_lora.convert(path, out, target, "transformer")
