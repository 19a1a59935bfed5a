"""Ways to put an adapter on a quantised model, and what each of them costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import made
import samples
import torch
from adapter_lab.core.adapters import load as load_algorithm
from adapter_lab.core.files import Adapter
from adapter_lab.core.merge.modules import quiet
from adapter_lab.core.quant import Settings
from adapter_lab.nodes.host import quantised as host
from torch import Tensor

LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1")
WAYS = ("none", "before", "beside", "native", "nearest")
_FIRST = ("lora_up.weight", "lokr_w1", "lokr_w1_a", "hada_w1_a")  # a factor of a whole delta


class Row(NamedTuple):
    """What the adapted layers give, on one random input each.

    Attributes:
        way: "none": the quantised model alone. "before": merged, then quantised. "beside": on
            activations. "native": ComfyUI's LoRA loader, which quantises the sum again, rounded
            by chance. "nearest": the same, rounded to nearest.
        error: relative, against the exact weights with the adapter.
        share: of the adapter's change of the exact layers that is in the change of these.
    """

    format: str
    algorithm: str
    way: str
    error: float
    share: float


def adapter(model: Any, algorithm: str, size: float) -> Adapter:
    """One for ``LAYERS`` of a plain Flux whose change has that size relative to each weight."""
    modules = {}
    for seed, path in enumerate(LAYERS):
        factors = made.factors(algorithm, samples.shape(model, path), seed)
        weight = layer(model, path).weight
        name = next(name for name in _FIRST if name in factors)
        delta = load_algorithm(factors).delta(weight)
        factors[name] = factors[name] * (size * weight.norm() / delta.norm())
        modules[path] = factors
    return made.adapter(modules)


def compare(
    file: Path, formats: Iterable[str], algorithm: str = "lora", size: float = 0.01
) -> Iterator[Row]:
    """Rows of a Flux checkpoint in full precision, in inference mode."""
    plain = comfy.sd.load_diffusion_model(str(file))
    given = adapter(plain, algorithm, size)
    exact, wanted = _outputs(plain), _outputs(samples.apply(plain, given, mode="merge"))
    effect = wanted - exact
    for form in formats:
        low = host.load(file, Settings(form), quiet)[0]
        alone = _outputs(low)
        ways: dict[str, Callable[[], Any]] = {
            "none": lambda low=low: low,
            "before": lambda form=form: host.load(
                file, Settings(form, adapters=[(given, 1.0)]), quiet
            )[0],
            "beside": lambda low=low: samples.apply(low, given, mode="bypass"),
            "native": lambda low=low: comfy.sd.load_lora_for_models(
                low, None, dict(given), 1.0, 1.0
            )[0],
            "nearest": lambda form=form: _nearest(host.load(file, Settings(form), quiet)[0], given),
        }
        for way in WAYS:
            y = _outputs(ways[way]())
            error = float((y - wanted).norm() / wanted.norm())
            share = float((y - alone) @ effect / (effect @ effect))
            yield Row(form, algorithm, way, error, share)


def table(rows: Iterable[Row]) -> str:
    """For people."""
    lines = [f"{'format':13}{'adapter':9}{'way':9}{'error':>8}{'survives':>10}"]
    for row in rows:
        lines.append(
            f"{row.format:13}{row.algorithm:9}{row.way:9}{row.error:8.2%}{row.share:10.1%}"
        )
    return "\n".join(lines)


def layer(model: Any, path: str) -> Any:
    """A layer of the diffusion model."""
    return model.model.diffusion_model.get_submodule(path)


def _outputs(model: Any) -> Tensor:
    comfy.model_management.load_models_gpu([model])
    given = []
    for seed, path in enumerate(LAYERS):
        linear, rng = layer(model, path), torch.Generator().manual_seed(seed)
        given.append(linear(torch.randn(64, linear.in_features, generator=rng)).flatten())
    return torch.cat(given)


def _nearest(model: Any, given: Adapter) -> Any:
    for path in LAYERS:
        linear, stem = layer(model, path), f"diffusion_model.{path}."
        factors = {k.removeprefix(stem): t for k, t in given.items() if k.startswith(stem)}
        weight = linear.weight.dequantize()
        again = linear.weight.requantize_from_float(
            weight + load_algorithm(factors).delta(weight), scale="recalculate",
            stochastic_rounding=0,
        )  # fmt: skip
        linear.weight = torch.nn.Parameter(again, False)
    return model
