"""``ema``: the average of a training's checkpoints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from ..merge.ema import Average, Settings, plan
from ..merge.menus import AVERAGES, ORDERS
from ..merge.modules import Tick
from ..merge.order import expand
from ..merge.products import ProductAverage
from . import base
from .base import Argument, Result, argument, choice

ABOUT = """Averages the checkpoints of a training run after it has ended (post-hoc EMA).

reconstruct: any width, from the averages that training tracked. power: a power function of the
step, from ordinary checkpoints. musubi-power, musubi-beta: the numbers of musubi-tuner's script.
A width, sigma_rel, is relative to the length of the training: above 0 to 0.2886."""
EXAMPLES = """
{prog} 'output/adapter_lab/runs/cat/*.safetensors' -o cat-ema.safetensors --sigma-rel 0.1
{prog} cat-000100.safetensors cat-000200.safetensors -o cat-ema.safetensors --profile power
{prog} 'cat-*.safetensors' -o cat-ema.safetensors --profile musubi-beta --beta 0.9 --beta2 0.95
"""


def arguments() -> Sequence[Argument]:
    return (
        argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="files, globs or folders"),
        choice("--profile", AVERAGES, "how they are weighted (reconstruct)", default="reconstruct"),
        argument("--sigma-rel", type=float, default=0.15, help="width of the average (0.15)"),
        argument("--beta", type=float, default=0.95, help="decay of musubi-beta (0.95)"),
        argument("--beta2", type=float, help="decay of its last file, if another"),
        choice("--order", ORDERS, "what the order of training is told by (step)", default="step"),
        argument("--first", type=int, default=0, metavar="STEP",
                 help="the first to take; below 0: counted from the end (0: no limit)"),
        argument("--last", type=int, default=0, metavar="STEP", help="the last to take, likewise"),
        argument("--products", action="store_true",
                 help="average the changes of the weights, not their factors, and factor anew"),
        *base.WRITING,
    )  # fmt: skip


def run(args: Namespace, tick: Tick) -> Result:
    files = [str(path) for path in expand(args.checkpoints)]
    base.check_out(args, files)
    settings = Settings(args.sigma_rel, args.beta, args.beta2)
    made = plan(
        files, args.profile, settings, order=args.order, first=args.first, last=args.last
    )  # fmt: skip
    job = (ProductAverage if args.products else Average)(made, tick=tick)
    metadata = job.write(args.out, overwrite=args.overwrite)
    return base.written(args, files, job.outcome, metadata)
