"""Random but plausible training data for the tiny models."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.nodes.host import model as host

SHAPES = {
    "flux": (16, 8, 8), "wan": (16, 1, 8, 8), "sd15": (4, 8, 8), "sd3": (16, 8, 8),
    "hunyuan_video": (16, 1, 8, 8), "cosmos": (16, 1, 8, 8), "ltxv": (128, 2, 4, 4),
}  # fmt: skip
TEXT = {
    "flux": (4, 64), "wan": (6, 4096), "sd15": (77, 768), "sd3": (5, 64), "hunyuan_video": (5, 64),
    "cosmos": (5, 1024), "ltxv": (5, 64),
}  # fmt: skip
POOLED = {"flux": 32, "sd3": 64, "hunyuan_video": 768}


def items(kind: str, count: int = 4, seed: int = 0) -> list[TrainItem]:
    """``count`` items with a conditioning of their own each."""
    rng = torch.Generator().manual_seed(seed)
    extra: dict[str, Any] = {}
    made = []
    for i in range(count):
        if kind in POOLED:
            extra = {"pooled_output": torch.randn(POOLED[kind], generator=rng)}
        latent, text = (torch.randn(s, generator=rng) for s in (SHAPES[kind], TEXT[kind]))
        made.append(TrainItem(latent, text, extra, caption=f"item {i}"))
    return made


def dataset(kind: str, count: int = 4, seed: int = 0) -> TrainDataset:
    """The same as a dataset."""
    return TrainDataset(items(kind, count, seed))


def prediction(model: Any, kind: str, sigma: float = 0.6) -> torch.Tensor:
    """What the network of a loaded model gives for one item: (x - x0) / sigma."""
    (item,) = items(kind, 1, seed=3)
    assert item.cond is not None
    x = torch.randn(1, *SHAPES[kind], generator=torch.Generator().manual_seed(4))
    more = {"y": item.extra["pooled_output"][None]} if kind in POOLED else {}
    if kind == "hunyuan_video":
        more["guidance"] = torch.tensor([6.0])
    x0 = model.model.apply_model(x, torch.tensor([sigma]), c_crossattn=item.cond[None], **more)
    return (x - x0) / sigma


def run(model: Any, kind: str) -> torch.Tensor:
    """The same with ``model`` loaded as for sampling."""
    comfy.model_management.load_models_gpu([model])
    return prediction(model, kind)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Assert that the two agree, relative to the second."""
    assert float((actual - expected).norm() / expected.norm()) < tolerance


def differs(actual: torch.Tensor, other: torch.Tensor) -> None:
    """Assert that the two are apart by much more than that."""
    assert float((actual - other).norm() / other.norm()) > 2e-3


def apply(model: Any, file: Any, strength: float = 1.0, **how: Any) -> Any:
    """``model`` with ``file`` on, all of which has to fit."""
    return host.apply(model, None, file, strength, 1.0, "error", **how).model


def shape(model: Any, path: str) -> tuple[int, ...]:
    """Of the weight of the module ``path``."""
    return host.shapes(model.model)[f"diffusion_model.{path}.weight"]
