"""A bias that is trained beside the weight of a layer."""

from __future__ import annotations

from torch import Tensor

from ..forms import Layer, Mode
from ..forms.layer import channels
from .full import Bias
from .wrapper import Acting


class Biased(Acting):
    """``inner`` on the weight, and ``diff_b`` or, of a norm, ``b_norm`` (out,) on the bias.

    Delta and bypass are those of the weight, as everywhere; the layer in training has both.
    """

    @property
    def bias(self) -> Bias:
        return Bias(self._own)

    def adapted(self, layer: Layer, x: Tensor, mode: Mode = "auto") -> Tensor:
        y, (bias,) = super().adapted(layer, x, mode), self._own.values()
        return y + channels(bias, layer.op).to(y)
