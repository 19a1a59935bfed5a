"""What the readers of a format expect of one module's tensors, said of the same change.

Functions on canonical suffix -> tensor of one module, whose scale these tensors tell.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..adapters import Algorithm, Tensors, Wrapper, load_parts
from ..errors import AdapterLabError
from ..files import is_finite
from ..tensors import scaled, wide
from .base import KeyFormat

UP, DOWN, BIAS = "lora_up.weight", "lora_down.weight", "lora_up.bias"
# Where a scale goes -> the factor beside it that may take a part.
_PARTNERS = {UP: DOWN, "hada_w1_a": "hada_w1_b", "lokr_w1_a": "lokr_w1_b", "lokr_w1": ""}


def worded(tensors: Tensors, form: KeyFormat) -> dict[str, Tensor]:
    """``tensors`` as the readers of ``form`` understand them.

    Raises:
        AdapterLabError: a factor that takes in the scale does not fit into its dtype.
    """
    if not form.folds:
        return _with_alpha(_plain(tensors))
    algorithm = loaded(tensors)
    folds = algorithm is not None and algorithm.name in form.folds
    return _as_peft(folded(tensors) if folds else _with_alpha(tensors))


def loaded(tensors: Tensors) -> Algorithm | None:
    """What ``tensors`` do to a weight, without what is wrapped around it."""
    algorithm = load_parts(tensors).get("weight")
    while isinstance(algorithm, Wrapper):
        algorithm = algorithm.inner
    return algorithm


def folded(tensors: Tensors) -> dict[str, Tensor]:
    """The same LoRA, LoHa or LoKr without ``alpha``, its scale s in the factors.

    s = m 2^e with 1/sqrt(2) <= |m| < sqrt(2): the powers of two are shared between a factor and
    its partner, both exactly; only m rounds, and only one of them.

    Raises:
        AdapterLabError: a factor does not fit into its dtype any more.
    """
    algorithm = loaded(tensors)
    carrier = next((name for name in _PARTNERS if name in tensors), "")
    if algorithm is None or not carrier:
        return dict(tensors)
    plain = {name: t for name, t in tensors.items() if name not in ("alpha", "scalar")}
    scale, partner = algorithm.scale, _PARTNERS[carrier]
    large, small = _split(scale) if partner in plain else (scale, 1.0)
    plain[carrier] = scaled(plain[carrier], large)
    if partner in plain:
        plain[partner] = scaled(plain[partner], small)
    _check(plain, carrier, partner)
    if BIAS in plain:
        plain[BIAS] = scaled(plain[BIAS], scale)
    return plain


def _split(scale: float) -> tuple[float, float]:
    """(m 2^a, 2^b) of s = m 2^(a + b), a and b as near as can be."""
    if not scale:
        return 0.0, 1.0
    m, e = math.frexp(scale)
    if abs(m) < math.sqrt(0.5):
        m, e = 2 * m, e - 1
    return m * 2.0 ** (e - e // 2), 2.0 ** (e // 2)


def _check(tensors: Tensors, *names: str) -> None:
    for name in names:
        if name in tensors and not is_finite(tensors[name].detach().cpu().contiguous()):
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            raise AdapterLabError(
                f"{name} does not fit into {dtype} with its scale multiplied in",
                fix="Choose another dtype",
            )


def _with_alpha(tensors: Tensors) -> dict[str, Tensor]:
    """With the ``alpha`` that their readers look for."""
    algorithm = None if "alpha" in tensors else loaded(tensors)
    if algorithm is None or not algorithm.scaled:
        return dict(tensors)
    return {**tensors, "alpha": torch.tensor(float(algorithm.alpha))}


def _plain(tensors: Tensors) -> Tensors:
    """``tensors`` without what peft alone has, for readers that know LyCORIS' and kohya's.

    The bias of the up factor becomes a difference, the magnitudes of DoRA a column.
    """
    plain, up = dict(tensors), tensors.get(UP)
    if up is None:
        return tensors
    if BIAS in plain and "diff_b" not in plain:
        bias, rank = plain.pop(BIAS), up.shape[1]
        scale = float(plain["alpha"].item()) / rank if "alpha" in plain else 1.0
        plain["diff_b"] = (wide(bias, bias) * scale).to(bias.dtype)
    for name in ("dora_scale", "magnitude"):
        vector = name in plain and (plain[name].ndim == 1 or name == "magnitude")
        if vector and plain[name].numel() == len(up):
            plain["dora_scale"] = plain.pop(name).reshape(-1, *(1,) * (up.ndim - 1))
    return plain


def _as_peft(tensors: Tensors) -> dict[str, Tensor]:
    """The other way round, of a LoRA whose scale is 1; lengths of columns have no name there."""
    said, up = dict(tensors), tensors.get(UP)
    if up is None:
        return said
    if "diff_b" in said and BIAS not in said:
        said[BIAS] = said.pop("diff_b")
    lengths = said.get("dora_scale")
    if lengths is not None and lengths.shape[:1] == up.shape[:1] and lengths.ndim == up.ndim:
        units = lengths.shape[2:]
        said["magnitude"] = said.pop("dora_scale").reshape(*((1, -1, *units) if units else (-1,)))
    return said
