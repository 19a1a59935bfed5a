"""What quantising loses: of weights, of outputs, and of an adapter that is put on it.

Weights are 3072 x 3072 from N(0, 0.02), the outliers 20 times as large. comfy-kitchen's own
quantiser is what ComfyUI's tools call; on a bf16 weight it works in bf16. Errors are relative, in
percent. Outputs are those of tiny models, and of the demo model, which is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import host
import torch
from adapter_lab.core.merge.menus import NUMBERS
from adapter_lab.core.merge.modules import quiet
from adapter_lab.core.quant import Settings
from adapter_lab.core.quant.encode import encode, largest
from adapter_lab.core.quant.formats import FORMATS
from adapter_lab.nodes.host import quantised
from pairs import say
from subjects import DEMO, decoded, demo
from torch import Tensor

import comfy.sd  # isort: skip
import calibrated
import samples
import tiny
import ways
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

SIZE, OUTLIERS, FACTOR = 3072, 0.001, 20
# What makes comfy-kitchen's quantiser do the same.
OPTIONS: dict[str, dict[str, Any]] = {
    "fp8_e4m3": {"scale": "recalculate"},
    "int8_row": {"per_channel": True},
    "int8_convrot": {"per_channel": True, "convrot": True},
    "mxfp8": {},
    "nvfp4": {},
}
STEPS = 10


def weights() -> Iterator[tuple[str, Tensor]]:
    """(kind, weight) with outliers of each kind."""
    noise = torch.Generator().manual_seed(0)
    plain = torch.randn(SIZE, SIZE, generator=noise) * 0.02
    single = torch.rand(SIZE, SIZE, generator=noise) < OUTLIERS
    few = torch.randperm(SIZE, generator=noise)[: round(SIZE * OUTLIERS)]
    row, column = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    row[few], column[:, few] = True, True
    kinds = {"random": single, "rows": row, "input columns": column}
    yield "none", plain
    for kind, where in kinds.items():
        yield kind, torch.where(where, plain * FACTOR, plain)


def apart(made: Tensor, exact: Tensor) -> float:
    """The relative error in percent."""
    return round(100 * float((made.double() - exact).norm() / exact.double().norm()), 3)


def kitchen(form: str, weight: Tensor) -> Tensor:
    """A weight through comfy-kitchen's quantiser and back to float32."""
    layout = QUANT_ALGOS[FORMATS[form].native]["comfy_tensor_layout"]
    made = QuantizedTensor.from_float(weight, layout, **OPTIONS[form])
    return made.to(torch.float32).dequantize()


def _ours(form: str, weight: Tensor) -> float:
    quality = encode(FORMATS[form], weight, largest(weight))[1]
    return round(100 * quality.error, 3)


def _errors(measure: Callable[..., None]) -> None:
    for kind, exact in weights():
        half = exact.to(torch.bfloat16)
        casts = {"bf16": half, "plain cast e4m3": exact.to(torch.float8_e4m3fn)}
        for name, cast in casts.items():
            say({"name": "quant_errors", "outliers": kind, "format": name,
                 "error": apart(cast.double(), exact)})  # fmt: skip
        for form in NUMBERS:
            say({
                "name": "quant_errors", "outliers": kind, "format": form,
                "ours": _ours(form, exact), "comfy-kitchen": apart(kitchen(form, exact), exact),
                "of bf16, ours": _ours(form, half),
                "of bf16, comfy-kitchen": apart(kitchen(form, half), half),
            })  # fmt: skip


def _outputs(kind: str, measure: Callable[..., None]) -> None:
    """One evaluation, and ``STEPS`` Euler steps with guidance. A CPU multiplies in full precision:
    the error of the weights alone."""
    path = tiny.write(kind, host.FOLDER / f"quant-{kind}.safetensors")
    with torch.inference_mode():
        exact = _runs(comfy.sd.load_diffusion_model(str(path)), kind)
        for form in NUMBERS:
            model, report = quantised.load(path, Settings(form), quiet)
            layers = report.layers.values()
            count = sum(layer.before for layer in layers) / 4  # numbers, of a file in float32
            once, sampled = map(apart, _runs(model, kind), exact)
            say({
                "name": f"quant_outputs_{kind}", "format": form, "layers": len(layers),
                "bits a weight": round(8 * sum(layer.after for layer in layers) / count, 3),
                "worst layer": round(100 * max(layer.error for layer in layers), 3),
                "evaluation": once, f"{STEPS} steps": sampled,
            })  # fmt: skip


def _runs(model: Any, kind: str) -> list[Tensor]:
    return [samples.run(model, kind), calibrated.sample(model, kind, STEPS)]


def _demo(measure: Callable[..., None]) -> None:
    """The same of the demo model's pictures."""
    subject, path = demo(), next((DEMO / "diffusion_models").glob("*.safetensors"))
    with torch.inference_mode():
        exact = subject.sample(subject.model, 0)
        picture = decoded([exact])
        for form in NUMBERS:
            model, report = quantised.load(path, Settings(form), quiet)
            made = subject.sample(model, 0)
            psnr = -10 * (decoded([made]) - picture).square().mean().log10()
            say({
                "name": "quant_outputs_demo", "format": form, "layers": len(report.layers),
                "latents": apart(made, exact), "psnr": round(float(psnr), 2),
            })  # fmt: skip


def _adapters(measure: Callable[..., None]) -> None:
    path = tiny.write("flux", host.FOLDER / "quant-flux.safetensors")
    with torch.inference_mode():
        for algorithm in ("lora", "lokr"):
            for size in (0.003, 0.01, 0.03):
                for row in ways.compare(path, NUMBERS, algorithm, size):
                    say({
                        "name": "quant_adapters", "format": row.format, "algorithm": algorithm,
                        "size": size, "way": row.way, "error": round(100 * row.error, 3),
                        "share": round(row.share, 4),
                    })  # fmt: skip


BENCHES: dict[str, Callable[..., None]] = {
    "quant_errors": _errors,
    "quant_outputs_flux": lambda measure: _outputs("flux", measure),
    "quant_outputs_wan": lambda measure: _outputs("wan", measure),
    "quant_outputs_demo": _demo,
    "quant_adapters": _adapters,
}
