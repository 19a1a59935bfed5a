"""The file tools as a command.

One module a tool, imported when it is called: ``--help`` must not wait for torch. It has
``ABOUT`` (what its help says first), ``EXAMPLES``, ``arguments()`` and ``run(args, tick)``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from ..errors import AdapterLabError
from .progress import Progress

if TYPE_CHECKING:
    from .base import Tool  # waits for torch

TOOLS = {
    "inspect": "what adapter files hold, and how they fit a model",
    "ema": "the average of a training's checkpoints",
    "merge": "several adapters as one",
    "bake": "a model file with adapters in its weights",
    "extract": "what a fine-tuned model has learned, as an adapter",
    "resize": "an adapter with another rank",
    "convert": "an adapter with the keys that another tool reads",
    "quantize": "a model file with smaller weights that ComfyUI loads",
}
CANCELLED = 130  # what shells expect of Ctrl-C
_SCIENTIFIC = re.compile(r"-(\d+\.?\d*|\.\d+)e[-+]?\d{1,3}", re.IGNORECASE)


class _Parser(argparse.ArgumentParser):
    """Says what makes no sense as JSON as well, where that was asked for."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        if self.as_json:
            _say(_json({"error": message}))
        super().error(message)


def main(argv: Sequence[str] | None = None, prog: str = "adapter-lab") -> int:
    """Run one tool; returns the exit code.

    0 done, 1 refused or failed, said in one sentence on stderr, 130 cancelled. Raises
    ``SystemExit`` with 2 for a command line that makes no sense, as ``argparse`` does. With
    ``--json`` there is one object on stdout in every case.
    """
    words = [_written_out(word) for word in (sys.argv[1:] if argv is None else argv)]
    as_json = "--json" in words
    name = _tool_of(words, prog, as_json)
    try:
        tool = cast("Tool", importlib.import_module(f".{name}", __package__))
        args = _parser(tool, f"{prog} {name}", as_json).parse_args(words[1:])
        with Progress(sys.stderr, quiet=args.quiet) as tick:
            result = tool.run(args, tick)
        _say(_json({"tool": name, **result.data}) if as_json else result.text)
    except AdapterLabError as error:
        return _failed(str(error), as_json)
    except OSError as error:  # of stdout, or it would be an AdapterLabError
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough
            sys.stderr.write(f"Cannot print the result: {error.strerror}.\n")
        return 1
    except KeyboardInterrupt:
        _failed("Cancelled; no file was written.", as_json)
        return CANCELLED
    return 0


def _written_out(word: str) -> str:
    """-1e-3 as -0.001, or ``argparse`` takes it for an option."""
    return f"{Decimal(word):f}" if _SCIENTIFIC.fullmatch(word) else word


def _tool_of(words: list[str], prog: str, as_json: bool) -> str:
    """The tool that is asked for; ends the process for help, the version or anything else."""
    rows = "\n".join(f"  {name:<10}{about}" for name, about in TOOLS.items())
    parser = _Parser(
        prog, usage=f"{prog} TOOL ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Tools for adapter files (LoRA and its kin) and the models they are for.",
        epilog=f"tools:\n{rows}\n\n'{prog} TOOL --help' tells the rest, with examples.",
    )  # fmt: skip
    parser.as_json = as_json
    parser.add_argument("--version", action="version", version=f"adapter-lab {version()}")
    parser.add_argument("tool", choices=tuple(TOOLS), metavar="TOOL", help="one of those below")
    return cast("str", parser.parse_args(words[:1]).tool)


def _parser(tool: Tool, prog: str, as_json: bool) -> argparse.ArgumentParser:
    examples = "\n".join(
        f"  {line}" for line in tool.EXAMPLES.format(prog=prog).strip().splitlines()
    )
    parser = _Parser(
        prog, description=tool.ABOUT, epilog=f"examples:\n{examples}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.as_json = as_json
    for argument in tool.arguments():
        parser.add_argument(*argument.names, **argument.options)
    return parser


def version() -> str:
    """Of the pack: that of the installed package, else of the checkout."""
    from importlib import metadata
    from pathlib import Path

    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        lines = project.read_text("utf-8").splitlines()
        return next(line.split('"')[1] for line in lines if line.startswith("version = "))
    return metadata.version("adapter-lab")


def _say(text: str) -> None:
    out: TextIO = sys.stdout
    try:
        out.write(f"{text}\n")
    except UnicodeEncodeError:  # a name in letters that the console has not
        out.write(f"{text}\n".encode(out.encoding, "backslashreplace").decode(out.encoding))
    out.flush()


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, default=str)


def _failed(sentence: str, as_json: bool) -> int:
    sys.stderr.write(f"{sentence}\n")
    if as_json:
        _say(_json({"error": sentence}))
    return 1
