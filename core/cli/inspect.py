"""``inspect``: what adapter files hold."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ..archs import ARCHITECTURES
from ..keys import ModelIndex, describe, resolve
from ..lazy import AdapterFile
from ..merge.modules import Tick
from ..streams import read_header
from .base import TELLING, Argument, Result, argument, one, paths

ABOUT = """Tells what adapter files hold: algorithm, ranks and alphas, key format, architecture,
trainer, trigger words, hashes, metadata. Reads them to the end, so that a damaged file is found."""
EXAMPLES = """
{prog} cat.safetensors
{prog} 'loras/**/*.safetensors' --json
{prog} cat.safetensors --model flux1-dev.safetensors
"""


def arguments() -> Sequence[Argument]:
    return (
        argument("adapters", nargs="+", metavar="ADAPTER", help="adapter files or globs"),
        argument("--model", metavar="FILE", help="model file: report which modules fit it, too"),
        argument("--architecture", choices=tuple(ARCHITECTURES), metavar="NAME",
                 help="of the model, where its names do not tell"),
        *TELLING,
    )  # fmt: skip


def run(args: Namespace, tick: Tick) -> Result:
    index = None
    if args.model:
        infos = read_header(one(args.model)).tensors
        index = ModelIndex({name: info.shape for name, info in infos.items()})
    told = [_tell(path, index, args.architecture, tick) for path in paths(args.adapters)]
    return Result("\n\n".join(text for text, _ in told), {"files": [data for _, data in told]})


def _tell(
    path: str, index: ModelIndex | None, architecture: str | None, tick: Tick
) -> tuple[str, dict[str, Any]]:
    with AdapterFile(path) as file:
        shell = file.shell()
        description = describe(shell)
        for done, name in enumerate(file):
            tick(done, len(file), f"reading {file.name}")
            _ = file[name]  # raises where it is damaged
    text, data = description.to_text(), {"path": path, **description.to_dict()}
    if index is not None:
        _, report = resolve(shell, index, architecture)
        text, data["report"] = f"{text}\n{report.to_text()}", report.to_dict()
    return text, data
