"""VeRA: two vectors a layer between random matrices that all layers share."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..tensors import scaled, wide
from .base import Shape, Tensors
from .lora import LoRA
from .reading import check_product, require
from .thin import Thin, product

A, B, LAMBDA_B, LAMBDA_D = "vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d"


class VeRA(Thin):
    """dW = diag(b) B[:out] diag(d) A[:, :in], unscaled.

    b = ``vera_lambda_b`` (out,), d = ``vera_lambda_d`` (r,). A (r, n) and B (m, r) are as large as
    the largest layer asks for, each takes the corner that it needs. peft keeps them once for the
    whole file, or only the seed that they come from; as tensors of a module they are whole.

    Reference: Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", section 3.1.
    """

    name = "vera"
    title = "VeRA"
    untrained = "its random matrices belong to a whole file, not to a module"
    suffixes = (A, B, LAMBDA_B, LAMBDA_D)
    scaled = False

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors, dims=1)
        if not factors:
            return None
        if factors.keys() == {LAMBDA_B, LAMBDA_D}:
            raise AdapterLabError(
                "The random matrices of a VeRA adapter are not in the file",
                expected=f"{A} and {B}, or adapter_config.json and the model to make them for",
                fix="Save it with save_projection=True",
            )
        a, b, lambda_b, lambda_d = require(factors, A, B, LAMBDA_B, LAMBDA_D)
        fits = a.ndim == b.ndim == 2 and lambda_b.ndim == lambda_d.ndim == 1
        fits = fits and len(a) == b.shape[1] == len(lambda_d) and len(lambda_b) <= len(b)
        check_product(fits, factors, LAMBDA_B, B, LAMBDA_D, A)
        return cls(factors)

    @property
    def rank(self) -> int:
        return len(self.tensors[LAMBDA_D])

    @property
    def alpha(self) -> float:
        return float(self.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, n): as wide as A is."""
        return (len(self.tensors[LAMBDA_B]), self.tensors[A].shape[1])

    def mismatch(self, shape: Shape) -> str | None:
        out, width = self.shape
        linear = len(shape) > 1 and math.prod(shape[2:]) == 1
        if linear and out == shape[0] and shape[1] <= width:
            return None
        return f"its delta is ({out}, up to {width}), the weight is {tuple(shape)}"

    def lora(self, weight: Tensor) -> LoRA:
        a, b, lambda_b, lambda_d = (
            wide(self.tensors[name], weight) for name in (A, B, LAMBDA_B, LAMBDA_D)
        )
        up = lambda_b[:, None] * b[: len(lambda_b)]
        return product(up, lambda_d[:, None] * a[:, : weight.shape[1]], self.scale)

    def state(self) -> dict[str, Tensor]:
        return {**self.tensors, LAMBDA_B: scaled(self.tensors[LAMBDA_B], self.scale)}
