"""What ComfyUI's model_sampling says about a model, as the objective wants it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from comfy import model_sampling as host

from ...core.errors import AdapterLabError
from ...core.train.process import Flow, Noise, Table, VarianceFlow


def noise(model_sampling: Any) -> Noise:
    """The noise levels of a model.

    Args:
        model_sampling: the object of that name of a ModelPatcher.

    Raises:
        AdapterLabError: the model does not go from noise to data, or not in a known way.
    """
    make = next((make for kind, make in _MAKERS if isinstance(model_sampling, kind)), None)
    if make is None:
        raise AdapterLabError(
            "This model cannot be trained",
            found=f"sampling {_names(model_sampling)}",
            expected="a model that removes noise: flow, eps, v or EDM",
        )
    return make(model_sampling)


def _flow(model_sampling: Any) -> Noise:
    if isinstance(model_sampling, host.ModelSamplingFlux):
        return Flow(math.exp(model_sampling.shift))
    if isinstance(model_sampling, host.ModelSamplingDiscreteFlow):
        return Flow(float(model_sampling.shift), float(getattr(model_sampling, "noise_scale", 1.0)))
    raise AdapterLabError(
        "This model's schedule is not known",
        found=_names(model_sampling),
        expected="that of ModelSamplingSD3, ModelSamplingFlux or the like",
    )


def _variance_flow(model_sampling: Any) -> Noise:
    return VarianceFlow(float(model_sampling.sigma_min), float(model_sampling.sigma_max))


def _table(kind: str, model_sampling: Any) -> Noise:
    # V_PREDICTION_DDPM has no use for sigma_data.
    data = float(getattr(model_sampling, "sigma_data", 1.0))
    return Table(kind, model_sampling.sigmas, data)


def _names(model_sampling: Any) -> str:
    """The classes of ComfyUI that it is made of."""
    return " and ".join(c.__name__ for c in type(model_sampling).__bases__)


# What the output of a model is, subclasses before their bases; None for models that turn one
# image into another.
_MAKERS: tuple[tuple[type, Callable[[Any], Noise] | None], ...] = (
    (host.IMG_TO_IMG_FLOW, None),
    (host.IMG_TO_IMG, None),
    (host.COSMOS_RFLOW, _variance_flow),
    (host.CONST, _flow),
    (host.X0, partial(_table, "x0")),
    (host.EDM, partial(_table, "edm")),
    (host.V_PREDICTION, partial(_table, "v")),
    (host.V_PREDICTION_DDPM, partial(_table, "v")),
    (host.EPS, partial(_table, "eps")),
)
