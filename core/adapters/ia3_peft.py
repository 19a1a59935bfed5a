"""(IA)^3 as peft writes it: whole factors, and the bias scaled with the output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..tensors import wide
from .base import Algorithm, Shape, Tensors
from .ia3 import ON_INPUT, WEIGHT, ChannelScale, check_vector
from .wrapper import Wrapper

L = "ia3_l"


class PeftIA3(ChannelScale):
    """W' = l o W, so dW = (l - 1) o W; of outputs b' = l o b as well.

    ``ia3_l`` is (out, 1) for the outputs of a linear layer, (1, in) for its inputs, and (1, n, 1,
    ..) for either side of a convolution, where the channels of the weight tell which. Where it has
    as many of both, ``feedforward_modules`` of peft's config names the layers whose input is
    meant; without a config the output is. Inputs that only a config tells are saved as (IA)^3 of
    LyCORIS, which can say so.

    Reference: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper
    than In-Context Learning", section 3.3.
    """

    name = "ia3_peft"
    title = "(IA)^3 (peft)"
    untrained = "(IA)^3 trains the same factors"
    suffixes = (L,)

    def __init__(self, tensors: Tensors, scale: float = 1.0) -> None:
        super().__init__(tensors, scale)
        self._axis = _side(tensors[L])

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors)
        if not factors:
            return None
        check_vector(factors, L)
        return cls(factors)

    def configured(self, config: Mapping[str, Any]) -> Self:
        """The same with its side fixed by ``feedforward_modules``: names that the path of the
        module, in ``config`` as ``module``, may end with, or a regex of the whole path.

        Raises:
            AdapterLabError: it is neither, or no regex.
        """
        listed, path = config.get("feedforward_modules"), str(config.get("module", ""))
        if self._axis is not None or listed is None:
            return self
        fixed = copy(self)
        fixed._axis = int(_is_listed(listed, path))
        return fixed

    @property
    def vector(self) -> Tensor:
        return wide(self.tensors[L], self.tensors[L]) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The axis that it knows or assumes, the other one 1."""
        n = self.tensors[L].numel()
        return (1, n) if self._axis else (n, 1)

    @property
    def traits(self) -> tuple[str, ...]:
        return ("input channels",) if self._axis else ()

    @property
    def bias(self) -> Algorithm | None:
        return None if self._axis else OnBias(self)

    def axis(self, shape: Shape) -> int:
        if self._axis is None:
            return int(shape[0] != self.tensors[L].numel() and len(shape) > 1)
        return self._axis

    def state(self) -> dict[str, Tensor]:
        if self._axis == 1 and _side(self.tensors[L]) is None:
            return {WEIGHT: self.vector * self.scale, ON_INPUT: torch.tensor(1)}
        if self.scale == 1:
            return dict(self.tensors)
        return {L: (1 + self.vector * self.scale).to(self.tensors[L].dtype)}


class OnBias(Wrapper):
    """What ``inner`` does to the output, done to the bias, (out,)."""

    @property
    def reads_output(self) -> bool:
        return True

    def delta(self, weight: Tensor) -> Tensor:
        return self.inner.delta(weight)


def _side(factor: Tensor) -> int | None:
    """The axis that the shape of ``ia3_l`` tells, None where it tells none."""
    rows, columns, *k = factor.shape
    return None if k or rows == columns else int(rows == 1)


def _is_listed(listed: Any, path: str) -> bool:
    """Whether ``path`` is one of ``feedforward_modules``."""
    failed = "feedforward_modules in adapter_config.json is"
    names: list[Any] = list(listed) if type(listed) in (list, tuple, set) else [listed]
    if not all(isinstance(name, str) for name in names):
        raise AdapterLabError(f"{failed} not usable", found=repr(listed), expected="names")
    if not isinstance(listed, str):
        return path.endswith(tuple(names))
    try:
        return bool(re.fullmatch(listed, path))
    except re.error as error:
        raise AdapterLabError(f"{failed} no regex", found=f"'{listed}' ({error})") from error
