"""``bake``: a model file with adapters in its weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from ..archs import ARCHITECTURES
from ..files import read_header
from ..merge.bake import bake
from ..merge.menus import PRECISIONS, QUANTISED
from ..merge.modules import Tick
from . import base
from .base import Argument, Result, argument

ABOUT = """Writes a model file with adapters merged into its weights, tensor by tensor.

Takes diffusion models and whole checkpoints; what no adapter touches is copied byte for byte."""
EXAMPLES = """
{prog} flux1-dev.safetensors cat.safetensors -o flux1-cat.safetensors
{prog} model.safetensors a.safetensors b.safetensors --strengths 0.8 -0.3 -o both.safetensors
{prog} small-fp8.safetensors cat.safetensors -o cat.safetensors --quantised dequantise --dtype bf16
"""


def arguments() -> Sequence[Argument]:
    return (
        argument("model", metavar="MODEL", help="model file to start from"),
        argument("adapters", nargs="+", metavar="ADAPTER", help="adapter files or globs"),
        argument("--strengths", nargs="+", type=float, metavar="NUMBER",
                 help="one for all adapters, or one for each (1)"),
        base.DTYPE,
        argument("--precision", choices=tuple(PRECISIONS), default="fp32",
                 help="what weights are rounded to between adapters (fp32)"),
        argument("--quantised", choices=QUANTISED, default="refuse",
                 help="what to do with quantised weights that would change (refuse)"),
        argument("--architecture", choices=tuple(ARCHITECTURES), metavar="NAME",
                 help="of the model, where its names do not tell"),
        *base.WRITING,
    )  # fmt: skip


def run(args: Namespace, tick: Tick) -> Result:
    model, adapters = base.one(args.model), base.paths(args.adapters)
    base.check_out(args, [model, *adapters])
    outcome = bake(
        model, args.out, base.weighed(adapters, args.strengths), dtype=args.dtype,
        precision=args.precision, quantised=args.quantised, architecture=args.architecture,
        overwrite=args.overwrite, tick=tick,
    )  # fmt: skip
    return base.written(args, [model, *adapters], outcome, read_header(args.out).metadata)
