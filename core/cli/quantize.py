"""``quantize``: a model file with smaller weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from ..archs import ARCHITECTURES
from ..files import read_header
from ..merge.modules import Tick
from ..quant import quantize_file
from ..quant.formats import FORMATS
from . import base
from .base import Argument, Result, argument

_FORMATS = "\n".join(
    f"  {name:<14}{form.about};\n{'':<16}fast on {form.compute}" for name, form in FORMATS.items()
)
ABOUT = f"""Quantises the linear layers of a diffusion model's file, tensor by tensor.

What loses too much stays as it is: norms, biases, embeddings, and the layers that the architecture
lists. ComfyUI's own loader (Load Diffusion Model, or a checkpoint's) takes the file. Adapters are
merged first: in a quantised weight most of a small change would be rounded away.

formats, all of which work on other hardware too, without being faster:
{_FORMATS}"""
EXAMPLES = """
{prog} flux1-dev.safetensors -o flux1-dev-fp8.safetensors
{prog} wan.safetensors -o wan-int8.safetensors --format int8_convrot --keep-worst 8
{prog} model.safetensors -o small.safetensors --keep 'single_blocks\\.0\\..*' --max-error 3 --json
{prog} model.safetensors --adapter cat.safetensors --strengths 0.8 -o cat-fp8.safetensors
"""


def arguments() -> Sequence[Argument]:
    return (
        argument("model", metavar="MODEL", help="model file in fp32, fp16 or bf16"),
        argument("--format", choices=tuple(FORMATS), default="fp8_e4m3", metavar="FORMAT",
                 help="of the weights (fp8_e4m3)"),
        argument("--keep", action="append", default=[], metavar="REGEX",
                 help="layers to leave as they are (matches their whole path); may be repeated"),
        argument("--keep-worst", type=int, default=0, metavar="N",
                 help="leave N layers as they are, those with the largest errors; takes a first "
                 "pass to measure them"),
        argument("--max-error", type=float, default=0.0, metavar="PERCENT",
                 help="leave layers as they are whose error would be larger; measured likewise"),
        argument("--adapter", action="append", default=[], metavar="FILE",
                 help="adapter file or glob to merge before; may be repeated"),
        argument("--strengths", nargs="+", type=float, metavar="NUMBER",
                 help="one for all adapters, or one for each (1)"),
        argument("--full-precision", action="store_true",
                 help="have ComfyUI dequantise fp8, mxfp8 and nvfp4 weights for each use on any "
                 "hardware; no effect on int8"),
        argument("--architecture", choices=tuple(ARCHITECTURES), metavar="NAME",
                 help="of the model, where its names do not tell"),
        *base.WRITING,
    )  # fmt: skip


def run(args: Namespace, tick: Tick) -> Result:
    model, adapters = base.one(args.model), base.paths(args.adapter)
    base.check_out(args, [model, *adapters])
    outcome = quantize_file(
        model, args.out, format=args.format, architecture=args.architecture, keep=args.keep,
        adapters=base.weighed(adapters, args.strengths), worst=args.keep_worst,
        most=args.max_error / 100, full_precision=args.full_precision,
        overwrite=args.overwrite, tick=tick,
    )  # fmt: skip
    return base.written(args, [model, *adapters], outcome, read_header(args.out).metadata)
