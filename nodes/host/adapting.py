"""Adapters in training on the modules of a model, until they are taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...core.adapters import Algorithm
from ...core.adapters.beside import Biased
from ...core.errors import AdapterLabError
from ...core.train.layer import Mode, adapted
from .checkpointing import standing_in
from .forward import Forward
from .frozen import HostLayer, is_resident
from .layers import dims

Now = Callable[[], Algorithm | None]


@contextmanager
def adapting(
    modules: Mapping[str, nn.Module],
    adapters: Mapping[str, Algorithm],
    current: Callable[[str], Algorithm | None],
    device: torch.device,
    mode: Mode,
    opaque: bool = False,
) -> Iterator[None]:
    """Let ``adapters`` act, and let no other layer keep a copy of its weight for backward.

    Args:
        modules: path -> module. adapters: path -> algorithm.
        current: path -> the algorithm as it acts now, None where it is left out.
        opaque: a compiler of whole blocks does not look into the layers that act, whose backward
            passes and chance it can't follow.

    Raises:
        AdapterLabError: no such module or parameter.
    """
    with ExitStack() as stack:
        layers = {path: module for path, module in modules.items() if dims(module) is not None}
        for path, module in layers.items():
            if path not in adapters and _costs_a_copy(module, device):
                stack.enter_context(_base_in_place(HostLayer(module, device), opaque))
        for path, algorithm in adapters.items():
            if path not in modules:
                raise AdapterLabError(
                    "An adapter has no module in the model", found=path, fix="Choose other targets"
                )
            module = modules[path]
            _require(module, path, algorithm)
            now = partial(current, path)
            if path in layers:
                stack.enter_context(_adapted_layer(module, device, now, mode, opaque))
            else:
                stack.enter_context(_adapted_parameters(module, partial(_for_all, now, algorithm)))
        yield


def _costs_a_copy(module: Any, device: torch.device) -> bool:
    """Whether the layer's own forward would leave a cast weight to autograd."""
    castable = hasattr(module, "comfy_cast_weights")
    return castable and not (is_resident(module, device) and not module.comfy_cast_weights)


def _require(module: nn.Module, path: str, algorithm: Algorithm) -> None:
    wanted = [a.parameter for a in (algorithm, algorithm.bias) if a is not None]
    missing = [name for name in wanted if module._parameters.get(name) is None]
    if missing:
        raise AdapterLabError(
            f"'{path}' has no {missing[0]} to train",
            found=type(module).__name__,
            fix="Choose other targets, or switch 'bias' off in Adapter Config",
        )


@contextmanager
def _base_in_place(layer: HostLayer, opaque: bool = False) -> Iterator[None]:
    """The layer's frozen forward where the module's own was, below adapters of other nodes."""
    given = vars(layer.module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        # Arguments beside the input are those of layers outside diffusion models.
        if len(args) + len(kwargs) > 1:
            return layer.forward(*args, **kwargs)
        return layer.base(args[0] if args else kwargs["input"])

    if not isinstance(given, Forward):
        with standing_in(layer.module, _closed(forward, opaque)):
            yield
        return
    layer.forward = given.previous
    given.previous = forward
    try:
        yield
    finally:
        given.previous = layer.forward


@contextmanager
def _adapted_layer(
    module: Any, device: torch.device, now: Now, mode: Mode, opaque: bool
) -> Iterator[None]:
    layer, given = HostLayer(module, device), vars(module).get("forward")
    others = given if isinstance(given, Forward) else None
    if others is not None:
        layer.forward = others.previous

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x, algorithm = args[0] if args else kwargs["input"], now()
        if others is None:
            return _changed(layer, x, algorithm, mode)
        # Each is that of the layer's own output, as when all of them are read from files.
        own = layer.base(x)
        return others.added(x, own, _changed(layer.giving(own), x, algorithm, "bypass"))

    with standing_in(module, _closed(forward, opaque)):
        yield


def _changed(layer: HostLayer, x: Tensor, algorithm: Algorithm | None, mode: Mode) -> Tensor:
    if algorithm is None:
        return layer.base(x)
    if algorithm.parameter == "bias":
        return _shifted(layer.base(x), layer, algorithm)
    y = adapted(algorithm, layer, x, mode)
    # One that was put beside the weight for training is in y already.
    bias = None if isinstance(algorithm, Biased) else algorithm.bias
    return y if bias is None else _shifted(y, layer, bias)


def _closed(forward: Callable[..., Tensor], opaque: bool) -> Callable[..., Tensor]:
    closed: Any = torch.compiler.disable(forward) if opaque else forward
    return closed


def _shifted(y: Tensor, layer: HostLayer, algorithm: Algorithm) -> Tensor:
    bias = layer.bias
    if bias is None:
        return y
    return y + algorithm.delta(bias).reshape(-1, *(1,) * layer.op.dims).to(y)


def _for_all(now: Now, algorithm: Algorithm) -> Algorithm | None:
    """A parameter is the same for all items: what differs between them leaves it alone."""
    drawn = now()
    return algorithm if drawn is not None and drawn.by_item else drawn


@contextmanager
def _adapted_parameters(module: Any, now: Now) -> Iterator[None]:
    """Weight and bias of a norm, also where the model reads them past the norm's forward."""

    def changed(name: str, value: Tensor) -> Tensor:
        algorithm = now()
        for a in (algorithm, algorithm and algorithm.bias):
            if a is not None and a.parameter == name:
                value = value + a.delta(value).to(value)
        return value

    names = [name for name, p in module._parameters.items() if p is not None]
    with ExitStack() as stack:
        if hasattr(module, "comfy_cast_weights"):
            for name in names:
                stack.enter_context(_function(module, name, changed))
        else:
            stack.enter_context(standing_in(module, _shadowed(module, names, changed)))
        yield


@contextmanager
def _function(module: Any, name: str, changed: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Through what ComfyUI passes each parameter that it casts for use."""
    table, key = vars(module), f"{name}_function"
    own, before = key in table, getattr(module, key, [])
    table[key] = [*before, lambda value: changed(name, value)]
    try:
        yield
    finally:
        if own:
            table[key] = before
        else:
            del table[key]


def _shadowed(
    module: Any, names: list[str], changed: Callable[[str, Tensor], Tensor]
) -> Callable[..., Any]:
    forward = module.forward

    def shadowed(*args: Any, **kwargs: Any) -> Any:
        # An attribute of the instance is found before a parameter of the same name.
        vars(module).update({name: changed(name, module._parameters[name]) for name in names})
        try:
            return forward(*args, **kwargs)
        finally:
            for name in names:
                vars(module).pop(name, None)

    return shadowed
