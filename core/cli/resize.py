"""``resize``: an adapter with another rank."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from ..lazy import AdapterFile
from ..merge.menus import NESTED
from ..merge.modules import Tick
from ..merge.resize import Resize
from . import base
from .base import Argument, Result, argument

ABOUT = f"""Makes every module of an adapter a LoRA of the rank that a rule gives it.

{base.RULES_SAID}
first-ranks: the first RANK of a DyLoRA as they are."""
EXAMPLES = """
{prog} cat.safetensors -o cat-8.safetensors --rank 8
{prog} cat.safetensors -o small.safetensors --rule sv_fro --parameter 0.95 --rank 32
{prog} cat-loha.safetensors -o cat.safetensors --rule error --parameter 0.05 --dtype bf16
"""


def arguments() -> Sequence[Argument]:
    return (
        argument("adapter", metavar="ADAPTER", help="adapter file of any algorithm"),
        *base.ranking(0, NESTED),
        base.DTYPE, base.MODEL, base.EXACT, base.SEED, *base.WRITING,
    )  # fmt: skip


def run(args: Namespace, tick: Tick) -> Result:
    adapter_file = base.one(args.adapter)
    model = base.one(args.model) if args.model else None
    inputs = [adapter_file, *([model] if model else [])]
    base.check_out(args, inputs)
    with AdapterFile(adapter_file) as adapter:
        job = Resize(
            adapter, base.rule_of(args), nested=args.rule == NESTED,
            dtype=base.DTYPES[args.dtype], base=model, exact=args.exact, seed=args.seed, tick=tick,
        )  # fmt: skip
        metadata = job.write(args.out, overwrite=args.overwrite)
    return base.written(args, inputs, job.outcome, metadata)
