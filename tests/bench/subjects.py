"""What the benches of skipped steps sample: the demo model, and one whose steps take longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import host

import comfy.sample  # isort: skip
import comfy.sd
import comfy.utils
import folder_paths
import tiny
import torch
from adapter_lab.nodes.demo import DemoText
from adapter_lab.nodes.host import caching as nodes
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "workflows" / "demo"
STEPS, CFG, BATCH = 30, 3.0, 4
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle")
# A step of it takes some 40 ms on one core.
LARGE = tiny.FLUX | dict(hidden_size=512, num_heads=4, depth=2, depth_single_blocks=4)


@dataclass
class Subject:
    """What is sampled: a model, a latent's shape, and conditionings of the prompt of a seed."""

    model: Any
    shape: tuple[int, ...]
    positive: Callable[[int], Any]
    negative: Any
    computed: int = 0  # evaluations of the blocks so far

    def __post_init__(self) -> None:
        blocks = self.model.model.diffusion_model.double_blocks
        blocks[0].register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.computed += 1

    def sample(
        self, model: Any, seed: int, steps: int = STEPS, cfg: float = CFG, batch: int | None = None
    ) -> Tensor:
        latent = torch.zeros(batch or self.shape[0], *self.shape[1:])
        noise = comfy.sample.prepare_noise(latent, seed)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, steps, cfg, "euler", "simple", self.positive(seed), self.negative,
                latent, disable_pbar=True, seed=seed,
            )  # fmt: skip


@cache
def demo() -> Subject:
    """The trained demo model; every seed has a prompt of its own kind."""
    folder_paths.set_user_directory(str(host.FOLDER / "user"))  # calibrations are kept there
    clip = DemoText.execute().result[0]

    def encoded(text: str) -> Any:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    def positive(seed: int) -> Any:
        colour, shape = COLOURS[seed % 6], SHAPES[seed // 6 % 3]
        return encoded(f"{colour} {shape} {('gradient', 'plain')[seed % 2]}")

    model = comfy.sd.load_diffusion_model(str(_only("diffusion_models")))
    return Subject(model, (BATCH, 16, 8, 8), positive, encoded(""))


@cache
def large() -> Subject:
    """Random weights in a Flux of some width."""
    with patch.dict(tiny.BUILDERS, large=(tiny.BUILDERS["flux"][0], LARGE)):
        path = tiny.write("large", host.FOLDER / "large.safetensors")
    some = torch.Generator().manual_seed(0)
    text = torch.randn(1, 16, LARGE["context_in_dim"], generator=some)
    pooled = {"pooled_output": torch.randn(1, LARGE["vec_in_dim"], generator=some)}
    model = comfy.sd.load_diffusion_model(str(path))
    return Subject(model, (1, 16, 16, 16), lambda _: [[text, pooled]], [[text * 0, pooled]])


def _only(folder: str) -> Path:
    return next((DEMO / folder).glob("*.safetensors"))


@cache
def _vae() -> Any:
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(_only("vae"))))


def decoded(latents: Sequence[Tensor]) -> Tensor:
    with torch.inference_mode():
        return _vae().decode(torch.cat(list(latents))).clamp(0, 1)


def ours(model: Any, **settings: Any) -> Any:
    return nodes.attach(model, nodes.Settings(**settings))


@contextmanager
def one_thread() -> Iterator[None]:
    """Processor time is then the time that passes on a machine that does nothing else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
