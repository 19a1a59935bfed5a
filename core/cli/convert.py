"""``convert``: an adapter with the keys that another tool reads."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import get_args

from ..archs import ARCHITECTURES
from ..keys import FORMATS
from ..lazy import AdapterFile
from ..merge.convert import Convert, Inexact
from ..merge.modules import Tick
from .base import DTYPE, DTYPES, WRITING, Argument, Result, argument, check_out, one, written

ABOUT = """Writes an adapter with the keys that another tool reads.

Fused weights (q, k and v in one) are split or joined as that tool has them: exactly where that is
possible, else as --inexact says."""
EXAMPLES = """
{prog} cat.safetensors -o cat-comfyui.safetensors --to comfyui
{prog} cat.safetensors -o pytorch_lora_weights.safetensors --to diffusers --architecture flux
"""


def arguments() -> Sequence[Argument]:
    formats = "; ".join(f"{name}: {form.title}" for name, form in FORMATS.items())
    return (
        argument("adapter", metavar="ADAPTER", help="adapter file"),
        argument("--to", required=True, choices=tuple(FORMATS), metavar="FORMAT", help=formats),
        argument("--architecture", choices=tuple(ARCHITECTURES), metavar="NAME",
                 help="of the model, where the file's names fit several"),
        argument("--inexact", choices=get_args(Inexact), default="svd",
                 help="modules that the format can't have exactly: svd: approximated, the error "
                 "said; error: refused; keep: left under the name that they have (svd)"),
        argument("--rank", type=int, default=0, help="of approximated modules (0: what they need)"),
        DTYPE, *WRITING,
    )  # fmt: skip


def run(args: Namespace, tick: Tick) -> Result:
    inputs = [one(args.adapter)]
    check_out(args, inputs)
    with AdapterFile(inputs[0]) as adapter:
        job = Convert(
            adapter, args.to, architecture=args.architecture, dtype=DTYPES[args.dtype],
            inexact=args.inexact, rank=args.rank, tick=tick,
        )  # fmt: skip
        metadata = job.write(args.out, overwrite=args.overwrite)
    return written(args, inputs, job.outcome, metadata)
