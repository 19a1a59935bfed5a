"""The scripts of a checkout of sd-scripts, which is on the path, for ``child.py``."""

from __future__ import annotations

import importlib
from typing import Any

import torch


def start() -> None:
    """Import what every script of it does, some of which no newer transformers has."""
    import transformers

    if not hasattr(transformers, "CLIPFeatureExtractor"):
        transformers.CLIPFeatureExtractor = transformers.CLIPImageProcessor  # type: ignore[attr-defined]
    importlib.import_module("svd_merge_lora")


def extract(base: str, tuned: str, out: str, rank: int) -> None:
    importlib.import_module("flux_extract_lora").svd(base, tuned, out, rank, no_metadata=True)


def merge(paths: list[str], ratios: list[float], out: str, method: str, rank: int) -> None:
    arguments = ["--models", *paths, "--ratios", *map(str, ratios), "--save_to", out]
    arguments += ["--precision", "float", "--no_metadata"]
    if method == "svd":
        _run("svd_merge_lora", "merge", *arguments, "--new_rank", str(rank))
    else:
        _run("merge_lora", "merge", *arguments, "--concat")


def resize(path: str, out: str, rank: int) -> None:
    _run("resize_lora", "resize", "--model", path, "--save_to", out, "--new_rank", str(rank))


def _run(module: str, function: str, *arguments: str) -> None:
    script: Any = importlib.import_module(module)
    with torch.no_grad():
        getattr(script, function)(script.setup_parser().parse_args(arguments))
