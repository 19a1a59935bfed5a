"""``quantize``: a model file with smaller weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from ..archs import ARCHITECTURES
from ..files import read_header
from ..merge.modules import Tick
from ..quant import quantize_file
from ..quant.formats import FORMATS
from .base import WRITING, Argument, Result, argument, check_out, one, written

ABOUT = """Quantises the linear layers of a diffusion model's file, tensor by tensor.

What loses too much stays as it is: norms, biases, embeddings, and the layers that the architecture
lists. ComfyUI's own loader (Load Diffusion Model, or a checkpoint's) takes the file."""
EXAMPLES = """
{prog} flux1-dev.safetensors -o flux1-dev-fp8.safetensors
{prog} model.safetensors -o small.safetensors --keep 'single_blocks\\.0\\..*' --json
"""


def arguments() -> Sequence[Argument]:
    return (
        argument("model", metavar="MODEL", help="model file in fp32, fp16 or bf16"),
        argument("--format", choices=tuple(FORMATS), default="fp8_e4m3",
                 help="; ".join(f"{name}: {form.title}" for name, form in FORMATS.items())),
        argument("--architecture", choices=tuple(ARCHITECTURES), metavar="NAME",
                 help="of the model, where its names do not tell"),
        argument("--keep", action="append", default=[], metavar="REGEX",
                 help="layers to leave as they are (matches their whole path); may be repeated"),
        *WRITING,
    )  # fmt: skip


def run(args: Namespace, tick: Tick) -> Result:
    source = one(args.model)
    check_out(args, [source])
    outcome = quantize_file(
        source, args.out, format=args.format, architecture=args.architecture, keep=args.keep,
        overwrite=args.overwrite, tick=tick,
    )  # fmt: skip
    return written(args, [source], outcome, read_header(args.out).metadata)
