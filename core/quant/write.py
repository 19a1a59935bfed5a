"""Model files with quantised weights that ComfyUI loads by itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..archs import ARCHITECTURES, ArchSpec
from ..errors import AdapterLabError
from ..files import is_finite
from ..header import DTYPES, Header
from ..keys.index import ModelIndex
from ..merge.modules import Tick, quiet
from ..merge.outcome import Outcome, Row, mebibytes
from ..streams import PathLike, Reader, write_stream
from ..train.patterns import Pattern, pattern
from .formats import FORMATS, MARKER, Format
from .stored import METADATA, helpers, is_quantised

_HALF = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def quantize_file(
    src: PathLike, dst: PathLike, *, format: str = "fp8_e4m3", architecture: str | None = None,
    keep: Iterable[str] = (), overwrite: bool = False, tick: Tick = quiet,
) -> Outcome:  # fmt: skip
    """Quantise the linear layers of a diffusion model's file, tensor by tensor.

    All else is copied: norms, biases, embeddings, convolutions, the other parts of a checkpoint,
    and the layers that the architecture lists as losing too much.

    Args:
        format: a name of ``formats.FORMATS``. architecture: of ``archs.ARCHITECTURES``; by default
            the one that the file's names and shapes tell.
        keep: regexes (full match on a layer's path) of further layers to copy.

    Returns:
        An outcome with a row and the relative error for each quantised layer; left out are the
        linear layers that were copied.

    Raises:
        AdapterLabError: unknown architecture or format, a bad regex, a file that is quantised
            already, no layer to quantise, NaN or infinity in a weight, all that
            :func:`.streams.write_stream` raises.
    """
    form, patterns = FORMATS[format], [pattern(text) for text in keep]
    if os.path.realpath(src) == os.path.realpath(dst):
        raise AdapterLabError(f"'{os.fspath(dst)}' is the input", fix="Choose another name.")
    with Reader(src) as reader:
        plan = _Plan.of(reader, form, architecture, patterns)
        outcome = Outcome(left_out=plan.kept)
        infos = plan.infos(reader.header)
        tensors = _tensors(reader, plan, outcome, tick)
        write_stream(dst, infos, tensors, reader.header.metadata, hashes=False, overwrite=overwrite)
        before = reader.header.size
    after = os.path.getsize(dst)
    sizes = mebibytes(before, after)
    outcome.verdict = f"{plan.spec.title}: {len(outcome.rows)} layers to {form.title}, {sizes}"
    outcome.facts = [("kept in high precision", f"{len(plan.kept)} linear layers")]
    return outcome


@dataclass(frozen=True)
class _Plan:
    """What becomes of a file: name of a weight -> path of its layer, for those to quantise."""

    spec: ArchSpec
    form: Format
    chosen: Mapping[str, str]
    kept: dict[str, str]

    @staticmethod
    def of(
        reader: Reader, form: Format, architecture: str | None, patterns: list[Pattern]
    ) -> _Plan:
        header = reader.header
        _refuse_quantised(reader.path, header)
        index = ModelIndex({name: info.shape for name, info in header.tensors.items()})
        spec = ARCHITECTURES[architecture] if architecture else index.architecture
        if spec is None:
            raise AdapterLabError(
                f"'{reader.path}' is of no known architecture, so what it can't lose is unknown",
                fix="Name the architecture it is like.",
            )
        chosen: dict[str, str] = {}
        kept: dict[str, str] = {}
        for path, module in index.part("model").items():
            name = module.key
            info = header.tensors[name]
            if len(info.shape) != 2 or not name.endswith(".weight"):
                continue
            if reason := _why_kept(path, info.shape, DTYPES[info.dtype], spec, form, patterns):
                kept[path] = reason
            else:
                chosen[name] = path
        if not chosen:
            raise AdapterLabError(
                f"'{reader.path}' has no layer to quantise",
                found=f"{len(kept)} linear layers, all kept",
            )
        return _Plan(spec, form, chosen, kept)

    def infos(self, header: Header) -> dict[str, tuple[torch.dtype | str, tuple[int, ...]]]:
        """Every tensor of the result."""
        infos: dict[str, tuple[torch.dtype | str, tuple[int, ...]]] = {}
        mark = self.form.marker()
        for name, info in header.tensors.items():
            if name not in self.chosen:
                infos[name] = (info.dtype, info.shape)
                continue
            layer = name.removesuffix("weight")
            infos |= {layer + part: info for part, info in self.form.layout(info.shape).items()}
            infos[layer + MARKER] = (mark.dtype, tuple(mark.shape))
        return infos


def _tensors(
    reader: Reader, plan: _Plan, outcome: Outcome, tick: Tick
) -> Iterator[tuple[str, Tensor]]:
    total = len(reader.header.tensors)
    for done, name in enumerate(reader.header.tensors):
        tick(done, total, f"quantising {name}" if name in plan.chosen else f"copying {name}")
        if name not in plan.chosen:
            yield name, reader.tensor(name)
            continue
        tensor = reader.tensor(name)
        if not is_finite(tensor):
            raise AdapterLabError(
                f"'{reader.path}' is damaged", found=f"NaN or infinity in '{name}'",
                fix="Use another copy of it.",
            )  # fmt: skip
        coded, error = plan.form.encode(tensor)
        del tensor
        outcome.rows[plan.chosen[name]] = Row(plan.form.title, error=error)
        layer = name.removesuffix("weight")
        for part in list(coded):
            yield layer + part, coded.pop(part)
        yield layer + MARKER, plan.form.marker()


def _why_kept(
    path: str, shape: tuple[int, ...], dtype: torch.dtype, spec: ArchSpec, form: Format,
    patterns: list[Pattern],
) -> str:  # fmt: skip
    """Why a linear layer stays as it is; empty where it need not."""
    if any(asked.fullmatch(path) for asked in patterns):
        return "as asked"
    if any(re.fullmatch(listed, path) for listed in spec.keep):
        return f"{spec.title} is sensitive to it"
    if not any(True for _ in spec.own.find(path)):
        return f"no known layer of {spec.title}"
    if not form.fits(shape):
        return f"{' x '.join(map(str, shape))} does not fit the format"
    return "" if dtype in _HALF else f"{dtype} is no plain weight"


def _refuse_quantised(path: str, header: Header) -> None:
    signs = [
        f"'{name}' in {info.dtype}"
        for name, info in header.tensors.items()
        if is_quantised(header, name) or (info.dtype.startswith("F8_") and len(info.shape) > 1)
    ]
    signs += sorted(helpers(header))
    signs += [METADATA] if METADATA in header.metadata else []
    if signs:
        raise AdapterLabError(
            f"'{path}' is quantised already", found=signs[0],
            fix="Take the original file: the errors of both would add up.",
        )  # fmt: skip
