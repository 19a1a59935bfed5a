"""The layers of MODEL and CLIP that can be trained, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...core.archs import ArchSpec
from ...core.errors import AdapterLabError
from ...core.train.targets import Targets, in_model
from .layers import dims, submodules
from .model import DIFFUSION
from .reach import reaches

Shape = tuple[int, ...]


def trainable(model: Any, clip: Any = None) -> dict[str, Shape]:
    """Full path -> shape of the weight, of every linear, convolution and norm; of text encoders
    those that the model depends on."""
    found = _weights(model, DIFFUSION)
    if clip is None:
        return found
    encoder = _weights(clip.patcher, "").items()
    return found | {path: shape for path, shape in encoder if reaches(path, clip, model)}


def chosen(
    targets: Targets | None, model: Any, clip: Any, arch: ArchSpec | None
) -> dict[str, Shape]:
    """Full path -> shape of what ``targets`` trains, the architecture's usual where it is None.

    Raises:
        AdapterLabError: nothing is left, or a text encoder is wanted and none is given.
    """
    targets = targets or Targets()
    if targets.train != "model" and clip is None:
        raise AdapterLabError(
            f"There is no text encoder to train, but 'train' is '{targets.train}'",
            fix="Connect 'clip' here and on Train Adapter, or set 'train' to model",
        )
    layers = trainable(model, clip if targets.train != "model" else None)
    return {path: layers[path] for path in targets.choose(layers, arch)}


def encoder_notes(targets: Targets | None, paths: Iterable[str]) -> list[str]:
    """What to say where a text encoder is to be trained and none of the chosen ``paths`` is."""
    if targets is None or targets.train != "both" or not all(map(in_model, paths)):
        return []
    return ["the model is trained alone: no layer of the text encoder is among the chosen modules"]


def with_bias(paths: Iterable[str], model: Any, clip: Any = None) -> set[str]:
    """Those of the layers and norms at the full ``paths`` that have a bias beside the weight."""
    modules = submodules(model.model)
    if clip is not None:
        modules |= submodules(clip.patcher.model)
    return {path for path in paths if modules[path]._parameters.get("bias") is not None}


def _weights(patcher: Any, below: str) -> dict[str, Shape]:
    kept: Mapping[str, Any] = patcher.backup
    found: dict[str, Shape] = {}
    for path, module in submodules(patcher.model).items():
        weight = module._parameters.get("weight")
        if weight is None or not path.startswith(below):
            continue
        key = f"{path}.weight"
        # What another clone has merged may have widened the weight.
        shape = tuple(kept[key].weight.shape if key in kept else weight.shape)
        if len(shape) == 1 or dims(module) is not None:
            found[path] = shape
    return found
