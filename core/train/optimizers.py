"""The optimizers there are, as rows of a table.

torch's are always there; those of pytorch-optimizer and bitsandbytes where these packages are
installed, which are imported only when one of theirs is built.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch

from ..errors import AdapterLabError

# package -> what pip calls it
PACKAGES = {
    "torch.optim": "torch",
    "pytorch_optimizer": "pytorch-optimizer",
    "bitsandbytes.optim": "bitsandbytes",
}
# Argument of a class -> the setting that it is given by.
FIELDS = {"lr": "learning_rate", "weight_decay": "weight_decay", "betas": "betas"}
# Arguments that say how to compute, for which state would have to lie elsewhere, or the opposite.
_MECHANICS = ("foreach", "fused", "capturable", "differentiable", "maximize", "optim_bits")


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Args:
        package: a key of ``PACKAGES``.
        cls: name of its class there.
        betas: its usual betas; empty where it has none.
        decays: whether it has a weight decay.
        rate: learning rate that suits adapters.
        arguments: arguments of the class that differ from its own defaults.
        averages: whether it averages the factors instead of lowering the rate (schedule-free):
            what it trains on is not what is meant to be used.
        estimates: whether it finds the rate by itself and takes the given one as a factor.
        matrices: whether it can update matrices only; AdamW then does the rest.
    """

    package: str
    cls: str
    betas: tuple[float, ...] = ()
    decays: bool = True
    rate: float = 1e-4
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    averages: bool = False
    estimates: bool = False
    matrices: bool = False

    def resolve(self) -> Callable[..., torch.optim.Optimizer]:
        """Its class.

        Raises:
            AdapterLabError: the package is not installed, or too old to have it.
        """
        pip = PACKAGES[self.package]
        failed = f"The optimizer '{self.cls}' is not there"
        fix = f"pip install --upgrade {pip}, in ComfyUI's Python, or choose another optimizer"
        try:
            module = importlib.import_module(self.package)
        except (ImportError, OSError, RuntimeError) as err:
            raise AdapterLabError(failed, found=f"no usable package {pip}: {err}", fix=fix) from err
        found = getattr(module, self.cls, None)
        if found is None:
            raise AdapterLabError(failed, found=f"a {pip} without it", fix=fix)
        return found

    def make(
        self,
        groups: Sequence[dict[str, Any]],
        rate: float,
        betas: tuple[float, ...],
        arguments: Mapping[str, Any],
    ) -> torch.optim.Optimizer:
        """One over ``groups`` of parameters, as torch has them.

        Raises:
            AdapterLabError: as :meth:`resolve`; an argument that the class does not have, or a
                value that it cannot use.
        """
        make = self.resolve()
        self._require(inspect.signature(make).parameters.values(), arguments)
        given = {**self.arguments, **arguments} | ({"betas": betas} if betas else {})
        try:
            return make(groups, lr=rate, **given)
        except (ValueError, TypeError, ArithmeticError, AssertionError) as err:
            raise AdapterLabError(f"{self.cls} refuses its settings", found=str(err)) from err

    def _require(
        self, parameters: Iterable[inspect.Parameter], arguments: Mapping[str, Any]
    ) -> None:
        known = {
            p.name: p.default
            for p in parameters
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.name not in ("params", *FIELDS, *_MECHANICS)
        }
        for name, value in arguments.items():
            if name not in known:
                raise AdapterLabError(
                    f"{self.cls} has no argument '{name}'", expected=f"one of {', '.join(known)}"
                )
            usual = known[name]
            # Few classes look at the type before the first step.
            if isinstance(usual, (int, float)) and not isinstance(value, (int, float, NoneType)):
                raise AdapterLabError(
                    f"The argument '{name}' of {self.cls} is unusable",
                    found=str(value),
                    expected=f"a number such as {usual}",
                )


_PO, _BNB = "pytorch_optimizer", "bitsandbytes.optim"
_FREE: dict[str, Any] = {"averages": True, "rate": 1e-3}

OPTIMIZERS: dict[str, Row] = {
    "AdamW": Row("torch.optim", "AdamW", (0.9, 0.999)),
    # Steps relative to the size of a factor would leave one that starts at zero there: the size
    # counts as at least 1.
    "Adafactor": Row("torch.optim", "Adafactor", arguments={"eps": (None, 1.0)}),
    # Rates as of AdamW: Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2.
    "Muon": Row(
        "torch.optim", "Muon", matrices=True, arguments={"adjust_lr_fn": "match_rms_adamw"}
    ),
    "SGD": Row("torch.optim", "SGD", rate=1e-2, arguments={"momentum": 0.9}),
    "ScheduleFreeAdamW": Row(_PO, "ScheduleFreeAdamW", (0.9, 0.999), **_FREE),
    "ScheduleFreeSGD": Row(_PO, "ScheduleFreeSGD", averages=True, rate=1.0),
    "ScheduleFreeRAdam": Row(_PO, "ScheduleFreeRAdam", (0.9, 0.999), **_FREE),
    "Prodigy": Row(_PO, "Prodigy", (0.9, 0.999), rate=1.0, estimates=True),
    "CAME": Row(_PO, "CAME", (0.9, 0.999, 0.9999)),
    "Lion": Row(_PO, "Lion", (0.9, 0.99), rate=2e-5),
    "Tiger": Row(_PO, "Tiger", rate=2e-5),
    "StableAdamW": Row(_PO, "StableAdamW", (0.9, 0.99)),
    # Decoupled like AdamW's, as of the other rows.
    "ADOPT": Row(_PO, "ADOPT", (0.9, 0.9999), arguments={"weight_decouple": True}),
    "SOAP": Row(_PO, "SOAP", (0.95, 0.95)),
    "AdEMAMix": Row(_PO, "AdEMAMix", (0.9, 0.999, 0.9999), arguments={"weight_decouple": True}),
    "Adan": Row(_PO, "Adan", (0.98, 0.92, 0.99), arguments={"weight_decouple": True}),
    "LaProp": Row(_PO, "LaProp", (0.9, 0.999)),
    "LAMB": Row(_PO, "Lamb", (0.9, 0.999), rate=1e-3),
    "MARS": Row(_PO, "MARS", (0.95, 0.99), arguments={"optimize_1d": True}),
    "RAdam": Row(_PO, "RAdam", (0.9, 0.999)),
    "AdamW8bit": Row(_BNB, "AdamW8bit", (0.9, 0.999)),
    "Lion8bit": Row(_BNB, "Lion8bit", (0.9, 0.99), rate=2e-5),
    "AdEMAMix8bit": Row(_BNB, "AdEMAMix8bit", (0.9, 0.999, 0.9999)),
}
