"""Adapters into a model file, one tensor in memory at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import merge_all
from ..errors import AdapterLabError
from ..files import is_finite
from ..header import layout
from ..lazy import AdapterFile
from ..stored import read_weight
from ..streams import PathLike, Reader, write_stream
from .bake_plan import Part, Plan
from .bake_report import metadata_of, tell_whole
from .menus import DTYPES, PRECISIONS, QUANTISED
from .model_names import Place
from .modules import Tick, quiet
from .outcome import Outcome

Given = tuple[Mapping[str, Tensor] | PathLike, float]


def bake(
    src: PathLike, dst: PathLike, adapters: Sequence[Given], *, dtype: str = "keep",
    precision: str = "fp32", quantised: str = "refuse", architecture: str | None = None,
    overwrite: bool = False, tick: Tick = quiet,
) -> Outcome:  # fmt: skip
    """Write the model file ``src`` with ``adapters`` merged into its weights, one after another.

    Every weight that no adapter touches is copied byte for byte, unless ``dtype`` asks otherwise.

    Args:
        src, dst: paths of model files (diffusion models or whole checkpoints).
        adapters: (tensors or path of a file, strength) each.
        dtype: what floating point tensors of more than one number are saved in; "keep": in what
            they are.
        precision: what a weight is rounded to before the first adapter and after each.
        quantised: "refuse" weights that are stored quantised and would change, or "dequantise"
            them; with a ``dtype`` all of them. The others stay as they are.
        architecture: of :data:`ARCHITECTURES`; found out from the names by default.
        tick: called before each tensor; what it raises ends the job and leaves no file.

    Returns:
        An outcome with a row for each module that went into the file.

    Raises:
        AdapterLabError: malformed files, a strength that is no number or 0 for all, an adapter of
            which nothing fits, ``dst`` equal to an input, a quantised weight, a value that
            ``dtype`` can't hold; all that :func:`.streams.write_stream` raises.
    """
    given = _checked(adapters, dtype=dtype, precision=precision, quantised=quantised)
    refuse_inputs(src, dst, given)
    outcome = Outcome()
    with ExitStack() as stack, torch.no_grad():
        reader = stack.enter_context(Reader(src))
        plan = Plan(reader, outcome, DTYPES[dtype])
        for adapter, strength in given:
            if not isinstance(adapter, Mapping):
                adapter = stack.enter_context(AdapterFile(adapter))
            plan.add(adapter, strength, architecture)
        plan.settle(quantised == "dequantise")
        infos = plan.infos()
        metadata = metadata_of(plan.metadata, plan.told, reader.path, os.fspath(dst))
        tensors = Work(plan, PRECISIONS[precision]).tensors(list(layout(infos)), tick)
        write_stream(dst, infos, tensors, metadata, hashes=False, overwrite=overwrite)
    sizes = (reader.header.size, os.path.getsize(dst))
    parts = (part.entry.part for group in plan.parts.values() for part in group)
    dtypes = (dtype for dtype, _ in infos.values())
    tell_whole(outcome, os.path.basename(src), sizes, dtypes, len(plan.parts), parts)
    return outcome


def _checked(adapters: Sequence[Given], **settings: str) -> list[Given]:
    """The adapters that change something; raises for what can't be meant."""
    known = {"dtype": DTYPES, "precision": PRECISIONS, "quantised": QUANTISED}
    for name, value in settings.items():
        if value not in known[name]:
            expected = f"one of {', '.join(known[name])}"
            raise AdapterLabError(f"Unknown {name} '{value}'", expected=expected)
    if not adapters:
        raise AdapterLabError("There is no adapter to bake")
    require_strengths(adapters)
    given = [(adapter, strength) for adapter, strength in adapters if strength]
    if not given:
        raise AdapterLabError(
            "Nothing would change", found="a strength of 0", fix="Choose another strength."
        )
    return given


def require_strengths(given: Sequence[Given]) -> None:
    """Raises ``AdapterLabError`` where a strength is NaN or infinite."""
    strange = [strength for _, strength in given if not math.isfinite(strength)]
    if strange:
        raise AdapterLabError("A strength is not a number", found=str(strange[0]))


def refuse_inputs(src: PathLike, dst: PathLike, given: Sequence[Given]) -> None:
    """Raises ``AdapterLabError`` where ``dst`` is ``src`` or an adapter, under whatever name."""
    paths = [src, *(a for a, _ in given if not isinstance(a, Mapping))]
    paths += [a.path for a, _ in given if isinstance(a, AdapterFile)]
    if any(_is_same(dst, path) for path in paths):
        raise AdapterLabError(f"'{os.fspath(dst)}' is an input", fix="Choose another name.")


def _is_same(one: PathLike, other: PathLike) -> bool:
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


@dataclass(frozen=True)
class Work:
    """The tensors of a result as they are made.

    Args:
        precision: what a weight is rounded to before the first adapter and after each.
    """

    plan: Plan
    precision: torch.dtype = torch.float32

    def tensors(self, keys: Sequence[str], tick: Tick) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) in this order."""
        infos = self.plan.reader.header.tensors
        total = sum(infos[key].end - infos[key].start for key in keys) / 1e6
        done = 0.0
        for count, key in enumerate(keys):
            tick(count, len(keys), f"{done:.0f} of {total:.0f} MB: {key}")
            yield key, self.made(key)
            done += (infos[key].end - infos[key].start) / 1e6

    def made(self, key: str) -> Tensor:
        """The tensor ``key`` as it is saved."""
        plan, saved = self.plan, self.plan.saved(key)
        weight = self.weight(key)
        if plan.is_copied(key):
            return weight
        result = weight.to(saved)
        del weight
        if not is_finite(result):
            raise self.strange(key)
        return result

    def weight(self, key: str) -> Tensor:
        """The same before it is saved: float32 where it is changed, else as the file has it."""
        plan = self.plan
        if key not in plan.parts and key not in plan.plain:
            return plan.reader.tensor(key)
        weight = self._read(key)
        for part in plan.parts.get(key, ()):
            weight = self._rounded(self._merged(self._rounded(weight), part))
        return weight

    def _merged(self, weight: Tensor, part: Part) -> Tensor:
        """``weight`` with one part in it: in its memory, or larger."""
        algorithm, rows = part.algorithm(), part.place.rows
        if part.beside and not algorithm.reads_output:
            algorithm = algorithm.settled(self._beside(part, part.beside))
        piece = weight if rows is None else weight.narrow(*rows)
        made = merge_all(piece, [(part.entry.slice, algorithm)])
        if rows is None:
            return made
        if made is not piece:
            piece.copy_(made)
        return weight

    def _beside(self, part: Part, place: Place) -> Tensor:
        """The model's own weight beside the bias that a part acts on."""
        weight = self._read(place.key)
        weight = weight if place.rows is None else weight.narrow(*place.rows)
        return weight if part.entry.slice is None else weight.narrow(*part.entry.slice)

    def _read(self, key: str) -> Tensor:
        """In float32, wider only where the file is."""
        reader = self.plan.reader
        wider = self.plan.own(key) == torch.float64
        return reader.tensor(key) if wider else read_weight(reader, key)

    def _rounded(self, weight: Tensor) -> Tensor:
        exact = self.precision == torch.float32
        return weight if exact else weight.to(self.precision).to(weight.dtype)

    def strange(self, key: str) -> AdapterLabError:
        """Why the tensor made of ``key`` holds what is no number."""
        saved = str(self.plan.saved(key)).removeprefix("torch.")
        if not is_finite(self._read(key)):
            return AdapterLabError(
                f"'{self.plan.reader.path}' is damaged", found=f"NaN or infinity in '{key}'",
                fix="Use another copy of it.",
            )  # fmt: skip
        if not is_finite(self.weight(key)):
            failed = f"The adapters make '{key}' larger than any number"
            return AdapterLabError(failed, fix="Choose smaller strengths.")
        failed = f"'{key}' does not fit into {saved}"
        return AdapterLabError(failed, fix="Choose another dtype, or smaller strengths.")
