"""Loading a model as it is, quantised while it loads, and from a quantised file.

Wan with 6 blocks of 2048 channels, random, 0.9 GB in bf16, in the page cache. Each loader has a
process of its own, and every page is looked at, as ComfyUI maps files. Pages of files are not in
the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import host
import tiny
import torch
from adapter_lab.core.merge.menus import NUMBERS
from adapter_lab.core.quant import quantize_file
from processes import Child

WIDE = tiny.WAN | dict(dim=2048, ffn_dim=8192, num_heads=16, num_layers=6)
PAIRS = 3
NATIVE = Child("loads", Path(__file__).parents[1] / "host")
OURS = Child("loads", Path(__file__).parents[1] / "host")


@cache
def _plain() -> Path:
    with patch.dict(tiny.BUILDERS, wide=(tiny.BUILDERS["wan"][0], WIDE)):
        return tiny.write("wide", host.FOLDER / "wide.safetensors", torch.bfloat16)


@cache
def _file(form: str) -> Path:
    path = host.FOLDER / f"wide-{form}.safetensors"
    quantize_file(_plain(), path, format=form)
    return path


def _bench(form: str, how: str, figure: str, measure: Callable[..., None]) -> None:
    mine = {"model": str(_plain()), "form": form} if how == "load" else {"model": str(_file(form))}
    theirs = {"model": str(_plain())}
    runs = [
        partial(getattr(child, figure), "load", **arguments)
        for child, arguments in ((OURS, mine), (NATIVE, theirs))
    ]
    unit = {"seconds": "s", "peak": "MiB private"}[figure]
    measure(*runs, "Load Diffusion Model, bf16", unit, PAIRS)


BENCHES: dict[str, Callable[..., None]] = {
    f"quant_{how}_{form}{suffix}": partial(_bench, form, how, figure)
    for how in ("load", "file")
    for form in NUMBERS
    for figure, suffix in (("seconds", ""), ("peak", "_memory"))
}
LONG = set(BENCHES)
