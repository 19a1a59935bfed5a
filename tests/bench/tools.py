"""The file tools of this pack as functions of paths, for ``child.py``."""

from __future__ import annotations

import torch
from adapter_lab.core.lazy import AdapterFile
from adapter_lab.core.merge import bake as baking
from adapter_lab.core.merge import ema as averages
from adapter_lab.core.merge import extract as extracting
from adapter_lab.core.merge.combine import Merge
from adapter_lab.core.merge.convert import Convert
from adapter_lab.core.merge.ranks import RankRule
from adapter_lab.core.merge.resize import Resize
from adapter_lab.core.quant import quantize_file


def start() -> None:
    """Nothing is held before the first call."""


def ema(paths: list[str], out: str) -> None:
    made = averages.plan(paths, "musubi power", averages.Settings(sigma_rel=0.2), order="as given")
    averages.Average(made).write(out, overwrite=True)


def extract(base: str, tuned: str, out: str, rank: int) -> None:
    extracting.extract(base, tuned, out, rank=rank, overwrite=True)


def merge(paths: list[str], ratios: list[float], out: str, method: str, rank: int) -> None:
    rule = RankRule(rank=rank)
    files = [AdapterFile(path) for path in paths]
    merged = Merge(files, ratios, method=method, rule=rule, dtype=torch.float32)
    merged.write(out, overwrite=True)


def resize(path: str, out: str, rank: int) -> None:
    rule = RankRule(rank=rank)
    Resize(AdapterFile(path), rule, dtype=torch.float32).write(out, overwrite=True)


def convert(path: str, out: str, form: str) -> None:
    Convert(AdapterFile(path), form).write(out, overwrite=True)


def bake(model: str, adapter: str, out: str) -> None:
    baking.bake(model, out, [(adapter, 1.0)], overwrite=True)


def quantize(model: str, out: str, form: str = "fp8_e4m3") -> None:
    quantize_file(model, out, format=form, architecture="wan", overwrite=True)
