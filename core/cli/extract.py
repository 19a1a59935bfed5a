"""``extract``: what a fine-tuned model has learned, as an adapter."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from ..merge.extract import Extract
from ..merge.menus import FITTED
from ..merge.modules import Tick
from . import base
from .base import Argument, Result, argument

ABOUT = f"""Writes the difference of two model files, tuned - base, as an adapter.

Works on one weight of both at a time.

{base.RULES_SAID}"""
EXAMPLES = """
{prog} flux1-dev.safetensors my-tune.safetensors -o tune.safetensors --rank 32
{prog} base.safetensors tuned.safetensors -o tune.safetensors --rule error --parameter 0.3 --rank 64
{prog} base.safetensors tuned.safetensors -o tune.safetensors --algorithm lokr
"""


def arguments() -> Sequence[Argument]:
    return (
        argument("base", metavar="BASE", help="model file that the tuned one began as"),
        argument("tuned", metavar="TUNED", help="model file"),
        argument("--algorithm", choices=tuple(FITTED), default="lora", help="of the result (lora)"),
        *base.ranking(16),
        argument("--no-convolutions", action="store_true", help="leave k x k convolutions out"),
        argument("--no-others", action="store_true", help="leave biases, norms and the like out"),
        argument("--factor", type=int, default=-1, help="how LoKr splits a dimension (-1: halves)"),
        argument("--clamp", type=float, default=1.0, metavar="QUANTILE",
                 help="cut the factors of a LoRA off there; sd-scripts: 0.99 (1: do not)"),
        argument("--min-change", type=float, default=1.0, metavar="UNITS",
                 help="a change of no more units in the last place and without direction is "
                 "rounding, and left out (1)"),
        argument("--min-diff", type=float, default=0.0, metavar="NUMBER",
                 help="leave text encoders out where no number has changed by more (0)"),
        argument("--dequantise", action="store_true", help="read quantised weights"),
        base.DTYPE, base.EXACT, base.SEED, *base.WRITING,
    )  # fmt: skip


def run(args: Namespace, tick: Tick) -> Result:
    inputs = [base.one(args.base), base.one(args.tuned)]
    base.check_out(args, inputs)
    job = Extract(
        *inputs, algorithm=args.algorithm, rule=base.rule_of(args), factor=args.factor,
        clamp=args.clamp, convolutions=not args.no_convolutions, others=not args.no_others,
        min_change=args.min_change, min_diff=args.min_diff, dequantise=args.dequantise,
        dtype=base.DTYPES[args.dtype], exact=args.exact, seed=args.seed, tick=tick,
    )  # fmt: skip
    metadata = job.write(args.out, overwrite=args.overwrite)
    return base.written(args, inputs, job.outcome, metadata)
