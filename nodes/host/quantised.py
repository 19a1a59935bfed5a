"""Models quantised while they are loaded, by ComfyUI's own loader, and written as files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
from comfy.quant_ops import QuantizedTensor

from ...core.errors import AdapterLabError
from ...core.merge.modules import Tick
from ...core.merge.outcome import counted
from ...core.quant import Quantised, Report, Settings, quantize, quantize_file
from ...core.quant.formats import FORMATS
from . import hardware, paths
from .layers import submodules
from .progress import ticker

_OTHERS = "Choose a diffusion model that ComfyUI loads."


@dataclass
class Unchanged(Report):
    """Of a file that is quantised already; nothing was done to it."""

    @property
    def verdict(self) -> str:
        return f"quantised already: {self.format}; loaded as it is"


def load(path: Path, settings: Settings, tick: Tick) -> tuple[Any, Report]:
    """A MODEL with the tensors that ``quantize_file`` would write, and the report.

    A file that ComfyUI runs quantised is loaded as it is.

    Raises:
        AdapterLabError: as :func:`quantize` does; such a file and an adapter; ComfyUI does not
            know the model, or does not take a layer in its format.
    """
    try:
        model, report = _loaded(path, settings, tick)
    except Quantised as error:
        if settings.adapters:
            raise _too_late(path, error) from error
        return _unchanged(path, error)
    # What ComfyUI makes a second copy by, for another device or without dynamic memory.
    model.cached_patcher_init = (_again, (path, settings))
    report.facts.append(hardware.told(FORMATS[settings.format], settings.full_precision))
    return model, report


def write(src: Path, dst: Path, settings: Settings, tick: Tick) -> Report:
    """The same as a file below the output folder. Raises all that ``quantize_file`` does."""
    report = quantize_file(src, dst, tick=tick, **vars(settings))
    report.facts.append(("file", dst.relative_to(paths.output()).as_posix()))
    report.facts.append(hardware.told(FORMATS[settings.format], settings.full_precision))
    return report


def _again(path: Path, settings: Settings, disable_dynamic: bool = False) -> Any:
    """The model anew, within whatever node needs it: its bar moves, and it can be cancelled."""
    try:
        return _loaded(path, settings, ticker(None), disable_dynamic)[0]
    except AdapterLabError as error:  # seen on a node that has no file
        raise error.about("The quantised model has to be made anew") from error


def _loaded(
    path: Path, settings: Settings, tick: Tick, disable_dynamic: bool = False
) -> tuple[Any, Report]:
    # ComfyUI takes the tensors out of the dict one by one: no weight is in memory twice.
    state, metadata, report = quantize(path, settings, tick)
    model = comfy.sd.load_diffusion_model_state_dict(
        state, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if model is None:
        raise AdapterLabError(f"ComfyUI does not know the model in '{path}'", fix=_OTHERS)
    modules = submodules(model.model.diffusion_model)
    weights = {name: getattr(modules.get(name), "weight", None) for name in report.layers}
    plain = [name for name, weight in weights.items() if not isinstance(weight, QuantizedTensor)]
    if plain:
        raise AdapterLabError(
            f"ComfyUI does not take {counted(len(plain), 'layer')} in this format",
            found=", ".join(plain[:3]), fix="Add them to 'keep'.",
        )  # fmt: skip
    _check_shapes(path, modules, report)
    return model, report


def _check_shapes(path: Path, modules: Mapping[str, Any], report: Report) -> None:
    """ComfyUI's layers of quantised models take weights of any shape, or none, until they run."""
    missing: list[str] = []
    for name, layer in modules.items():
        if not hasattr(layer, "out_features"):
            continue
        if getattr(layer, "weight", None) is None:
            missing.append(name)
            continue
        shape, wanted = layer.weight.shape, (layer.out_features, layer.in_features)
        if tuple(shape[-2:]) != wanted:
            raise AdapterLabError(
                f"'{path}' does not fit the model that it seems to be",
                found=f"'{name}' of {' x '.join(map(str, shape)) or 'a single number'}",
                expected=" x ".join(map(str, wanted)), fix="Use another copy of the file.",
            )  # fmt: skip
    if missing:
        told = f"{counted(len(missing), 'layer')} of the model not in the file"
        report.warnings.append(f"{told}, such as '{missing[0]}'")


def _unchanged(path: Path, error: Quantised) -> tuple[Any, Report]:
    found = Counter(error.forms.values()).most_common()
    told = ", ".join(f"{counted(count, 'weight')} in {form}" for form, count in found)
    report = Unchanged(told, "")
    report.facts.append(("another format", "is made from the original file, best in bf16"))
    return comfy.sd.load_diffusion_model(str(path)), report


def _too_late(path: Path, error: Quantised) -> AdapterLabError:
    return AdapterLabError(
        f"'{path}' is quantised already: an adapter can't go into it before that",
        found=error.found,
        fix="Leave 'adapter' empty and connect Apply Adapter behind this node, which puts it "
        "beside the weights; or take the original file.",
    )
