"""What the tools let one choose from, apart from them: a menu must not load what it names."""

from __future__ import annotations

from typing import Literal

import torch

Sign = Literal["total", "frequency"]
Inexact = Literal["svd", "error", "keep"]

EXACT = ("auto", "concatenate")
TIES = ("ties", "dare", "dare_ties")
KOHYA = ("kohya", "kohya concat", "kohya svd")
METHODS = (*EXACT, "svd", *TIES, *KOHYA)  # of merging
SIGNS: tuple[Sign, ...] = ("total", "frequency")
FITTED = ("lora", "lokr", "dora", "full")  # what is extracted
DORA_AXES = ("input", "output")
AVERAGES = ("reconstruct", "power", "musubi power", "musubi beta")
ORDERS = ("step", "modified", "as given")
RULES = ("fixed", "sv_ratio", "sv_fro", "sv_cumulative", "error")  # of ranks
NESTED = "first ranks"  # beside the rules: the first ranks of a DyLoRA
INEXACT: tuple[Inexact, ...] = ("svd", "keep", "error")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES = {"keep": None, **PRECISIONS}  # of results
QUANTISED = ("refuse", "dequantise")
# Names of ``core.quant.formats``, whose order a menu has.
NUMBERS = ("fp8_e4m3", "int8_row", "int8_convrot", "mxfp8", "nvfp4")
