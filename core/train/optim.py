"""The optimizer of a run: rates by module, bfloat16 factors, and a state that resumes exactly."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import Algorithm
from ..errors import AdapterLabError
from .config import OptimizerConfig
from .optimizers import OPTIMIZERS, Row
from .random import generator
from .rates import Rated, rated
from .rounding import joined, split, stochastic

State = dict[str, Any]
_GIVEN = ("params", "lr")  # of a group of parameters: not its state


class Optimizer:
    """One or several of torch's optimizers over all factors.

    They see each float32 factor itself; of a bfloat16 one a float32 copy that exists during the
    update only, so that their moments are float32 and nothing below the resolution gets lost.

    Args:
        adapters: by module path, their factors as leaves on the device.
        seed: of stochastic rounding.

    Attributes:
        factors: what is trained, by module path.

    Raises:
        AdapterLabError: nothing to train; a rate whose pattern matches no module; settings that
            the optimizer or the algorithm has no use for; a package that is not installed.
    """

    def __init__(
        self, adapters: Mapping[str, Algorithm], config: OptimizerConfig, seed: int = 0
    ) -> None:
        self.config, self.seed = config, seed
        self._rated = rated(adapters, config)
        self.factors = [r.factor for r in self._rated]
        self._seen = [_seen(factor) for factor in self.factors]
        kahan = config.rounding == "kahan"
        self._rest = {
            i: torch.zeros_like(factor, dtype=torch.int16)
            for i, factor in enumerate(self.factors)
            if kahan and factor is not self._seen[i]
        }
        self.parts = self._parts()
        self._rates = [[float(g["lr"]) for g in part.param_groups] for part in self.parts]
        self._made = [[_facts(g) for g in part.param_groups] for part in self.parts]
        self._evaluated = False
        self._release()

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of ``step`` (counted from 0) of ``steps``; of an optimizer that finds it
        by itself the product with what it has found so far."""
        own = self.parts[0].param_groups[0]["d"] if self.config.row.estimates else 1.0
        return self.config.rate(step, steps) * own

    @torch.no_grad()
    def step(self, step: int, steps: int) -> None:
        """Update the factors by their gradients."""
        share = self.config.share(step, steps)
        for part, rates in zip(self.parts, self._rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * share
        self._fill()
        for part in self.parts:
            part.step()
        self._round(step)
        self._release()

    def clear(self) -> None:
        """Forget the gradients."""
        for factor in self.factors:
            factor.grad = None

    @contextmanager
    def evaluated(self) -> Generator[None, None, None]:
        """The factors as they are meant to be used; inside, nothing may be trained or saved.

        Those of schedule-free optimizers are averages, which going there and back by arithmetic
        would not restore to the bit: the factors of training are kept.
        """
        if self._evaluated or not self.config.row.averages:
            yield
            return
        kept = [factor.detach().clone() for factor in self.factors]
        self._evaluated = True
        try:
            self._average()
            yield
        finally:
            self._evaluated = False
            with torch.no_grad():
                for factor, before in zip(self.factors, kept, strict=True):
                    factor.copy_(before)

    @torch.no_grad()
    def _average(self) -> None:
        self._fill()
        for part in self.parts:
            cast(Any, part).eval()
            for group in part.param_groups:
                group["train_mode"] = True
        for factor, seen in zip(self.factors, self._seen, strict=True):
            if factor is not seen:
                factor.copy_(seen)
        self._release()

    def state_dict(self) -> State:
        """Everything that the next updates depend on besides factors and settings.

        Nested dicts and lists of tensors, numbers, texts and None. What belongs to a factor goes by
        the name of the factor, so that groups may be others when it is loaded.
        """
        if self._evaluated:
            raise RuntimeError("the factors are not those of training now")
        names = {id(seen): r.name for r, seen in zip(self._rated, self._seen, strict=True)}
        parts = [
            {
                "groups": [_evolved(g, m) for g, m in zip(part.param_groups, made, strict=True)],
                "members": [[names[id(p)] for p in g["params"]] for g in part.param_groups],
                "factors": {names[id(p)]: dict(state) for p, state in part.state.items()},
            }
            for part, made in zip(self.parts, self._made, strict=True)
        ]
        rest = {self._rated[i].name: rest for i, rest in self._rest.items()}
        return {"optimizer": self.config.optimizer, "parts": parts, "rest": rest}

    def load_state_dict(self, state: State) -> None:
        """Continue from what :meth:`state_dict` gave; settings stay those of this optimizer.

        Raises:
            AdapterLabError: it is the state of another optimizer.
        """
        if state["optimizer"] != self.config.optimizer:
            raise AdapterLabError(
                "The run was started with another optimizer",
                found=f"the state of {state['optimizer']}",
                expected=self.config.optimizer,
                fix="Choose the optimizer of the run, or another run name",
            )
        seen = {r.name: seen for r, seen in zip(self._rated, self._seen, strict=True)}
        names = {id(p): name for name, p in seen.items()}
        devices = {r.name: r.factor.device for r in self._rated}
        for part, stored in zip(self.parts, state["parts"], strict=True):
            for name, entries in stored["factors"].items():
                part.state[seen[name]] = _moved(entries, devices[name])
            groups = {n: g for m, g in zip(stored["members"], stored["groups"], strict=True)
                      for n in m}  # fmt: skip
            for group in part.param_groups:
                first = names[id(group["params"][0])]
                group.update(_moved(groups[first], devices[first]))
        for i, rest in self._rest.items():
            if self._rated[i].name in state["rest"]:
                rest.copy_(state["rest"][self._rated[i].name])

    def _parts(self) -> list[torch.optim.Optimizer]:
        row, arguments = self.config.row, self.config.parsed_arguments()
        pairs = list(zip(self._rated, self._seen, strict=True))
        if not row.matrices:
            return [self._part(row, pairs, arguments)]
        others = OPTIMIZERS["AdamW"]
        kinds = {True: (row, arguments), False: (others, dict[str, Any]())}
        return [
            self._part(which, chosen, given)
            for kind, (which, given) in kinds.items()
            if (chosen := [pair for pair in pairs if _is_matrix(pair[0].factor) == kind])
        ]

    def _part(
        self, row: Row, pairs: Sequence[tuple[Rated, Tensor]], arguments: Mapping[str, Any]
    ) -> torch.optim.Optimizer:
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for r, seen in pairs:
            groups.setdefault((r.rate, r.decays), []).append(seen)
        if row.estimates and len({rate for rate, _ in groups}) > 1:
            raise AdapterLabError(
                f"{row.cls} has one learning rate for all factors",
                fix="Clear 'rates', set 'lora_plus' to 1 and 'text_encoder_rate' to 0",
            )
        decay = self.config.weight_decay
        listed = [
            {"params": seen, "lr": rate} | ({"weight_decay": decay * on} if row.decays else {})
            for (rate, on), seen in groups.items()
        ]
        betas = self.config.parsed_betas() if row is self.config.row else row.betas
        return row.make(listed, self.config.learning_rate, betas, arguments)

    def _fill(self) -> None:
        """Give the copies of bfloat16 factors their values and gradients."""
        for i, (factor, seen) in enumerate(zip(self.factors, self._seen, strict=True)):
            if factor is not seen:
                rest = self._rest.get(i)
                seen.data = factor.detach().float() if rest is None else joined(factor, rest)
                seen.grad = None if factor.grad is None else factor.grad.float()

    def _round(self, step: int) -> None:
        """Write the copies back."""
        noise: dict[torch.device, torch.Generator] = {}
        for i, (factor, seen) in enumerate(zip(self.factors, self._seen, strict=True)):
            if factor is seen:
                continue
            if i in self._rest:
                value, rest = split(seen.detach())
                self._rest[i].copy_(rest)
            else:
                if factor.device not in noise:
                    number = generator(self.seed, "rounding", step).initial_seed()
                    noise[factor.device] = torch.Generator(factor.device).manual_seed(number)
                value = stochastic(seen.detach(), noise[factor.device])
            factor.copy_(value)

    def _release(self) -> None:
        for factor, seen in zip(self.factors, self._seen, strict=True):
            if factor is not seen:
                seen.data, seen.grad = seen.new_empty(0), None


def _is_matrix(factor: Tensor) -> bool:
    return factor.ndim == 2 and min(factor.shape) > 1


def _seen(factor: Tensor) -> Tensor:
    """What an optimizer is given for ``factor``."""
    if factor.dtype == torch.float32:
        return factor
    if factor.dtype != torch.bfloat16:
        dtype = str(factor.dtype).removeprefix("torch.")
        raise AdapterLabError("Factors of this dtype cannot be trained", found=dtype)
    return torch.nn.Parameter(factor.detach().float())


def _facts(group: Mapping[str, Any]) -> State:
    return {key: deepcopy(value) for key, value in group.items() if key not in _GIVEN}


def _evolved(group: Mapping[str, Any], made: Mapping[str, Any]) -> State:
    """What training changed in a group since it was made, which is state; the rest are settings."""
    return {
        key: value
        for key, value in group.items()
        if key not in _GIVEN
        and (isinstance(value, Tensor) or key not in made or value != made[key])
    }


def _moved(value: Any, device: torch.device, name: str = "") -> Any:
    """A copy of ``value`` with its tensors on ``device``; counters stay where torch has them."""
    if isinstance(value, Tensor):
        moved = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype,
            device=value.device if name == "step" else device,
        )  # fmt: skip
        return moved.copy_(value.detach())
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {key: _moved(entry, device, str(key)) for key, entry in items}
    if isinstance(value, (list, tuple)):
        entries = [_moved(entry, device, name) for entry in cast("Sequence[Any]", value)]
        return tuple(entries) if isinstance(value, tuple) else entries
    return value
