"""``merge``: several adapters as one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack

from ..archs import ARCHITECTURES
from ..lazy import AdapterFile
from ..merge.combine import Merge
from ..merge.menus import METHODS, SIGNS
from ..merge.modules import Tick
from . import base
from .base import Argument, Result, argument, choice

ABOUT = f"""Writes one adapter whose change of each weight is the sum of those of several, of any
algorithms and key formats.

auto: exact, unless a rank or rule limits it. concatenate: exact, whatever rank that takes. svd:
each sum as a LoRA of the rank that the rule gives. ties, dare, dare_ties: of what the adapters
disagree about. kohya, kohya-concat, kohya-svd: the numbers of sd-scripts, for old recipes.

{base.RULES_SAID}"""
EXAMPLES = """
{prog} cat.safetensors dog.safetensors -o both.safetensors --ratios 0.7 0.5
{prog} cat.safetensors dog.safetensors -o both.safetensors --method svd --rank 32
{prog} 'styles/*.safetensors' -o all.safetensors --method dare_ties --density 0.3 --rank 64
"""


def arguments() -> Sequence[Argument]:
    return (
        argument("adapters", nargs="+", metavar="ADAPTER", help="adapter files or globs"),
        argument("--ratios", nargs="+", type=float, default=[1.0], metavar="NUMBER",
                 help="one for all adapters, or one for each; may be negative (1)"),
        choice("--method", METHODS, "how (auto)", default="auto"),
        *base.ranking(0),
        argument("--density", type=float, default=0.5, help="share that ties and dare keep (0.5)"),
        argument("--sign", choices=SIGNS, default="total",
                 help="majority of ties: by the sum of values or by their count (total)"),
        argument("--architecture", choices=tuple(ARCHITECTURES), metavar="NAME",
                 help="of the model, where the files' names fit several"),
        base.DTYPE, base.MODEL, base.SEED, *base.WRITING,
    )  # fmt: skip


def run(args: Namespace, tick: Tick) -> Result:
    adapters = base.paths(args.adapters)
    model = base.one(args.model) if args.model else None
    inputs = [*adapters, *([model] if model else [])]
    base.check_out(args, inputs)
    with ExitStack() as stack:
        files = [stack.enter_context(AdapterFile(path)) for path in adapters]
        job = Merge(
            files, args.ratios, method=args.method, rule=base.rule_of(args), density=args.density,
            sign=args.sign, seed=args.seed, dtype=base.DTYPES[args.dtype], base=model,
            architecture=args.architecture, tick=tick,
        )  # fmt: skip
        metadata = job.write(args.out, overwrite=args.overwrite)
    return base.written(args, inputs, job.outcome, metadata)
