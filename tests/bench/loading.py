"""Time from file to patched weights, beside LoraLoader on the same file and model."""

from __future__ import annotations

from collections.abc import Callable

import host
import tiny
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.files import Adapter, write_adapter
from adapter_lab.core.train.random import generator
from adapter_lab.nodes.host.session import layers
from adapter_lab.nodes.load import LoadAdapter
from comfy.sd import load_diffusion_model
from pairs import timed

import nodes

PAIRS, RANK, NAME = 15, 64, "bench.safetensors"


def _file(model, algorithm: str) -> None:
    """An adapter on every layer of the model, in kohya's spelling."""
    tensors = {}
    for name, module in layers(model).items():
        config = AdapterConfig(algorithm, RANK, RANK)
        shape = tuple(module.weight.shape)
        made = ALGORITHMS[algorithm].init(shape, config, generator(0, name))
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in made.state().items()}
    write_adapter(host.FOLDER / "loras" / NAME, Adapter(tensors))


def _bench(kind: str, algorithm: str) -> Callable[..., None]:
    def bench(measure: Callable[..., None]) -> None:
        with torch.inference_mode():
            model = load_diffusion_model(str(tiny.write(kind, host.FOLDER / f"{kind}.safetensors")))
        _file(model, algorithm)

        def ours() -> None:
            result = LoadAdapter.execute(model, NAME, 1.0, 1.0, "auto", "report").result
            result[0].patch_model()
            result[0].unpatch_model()

        def peer() -> None:
            # A fresh node: an old one keeps the file of its last run in memory.
            patched, _ = nodes.LoraLoader().load_lora(model, None, NAME, 1.0, 1.0)
            patched.patch_model()
            patched.unpatch_model()

        with torch.inference_mode():
            measure(timed(ours), timed(peer), "LoraLoader", "s", PAIRS)

    return bench


BENCHES = {
    f"load_{kind}_{algorithm}": _bench(kind, algorithm)
    for kind in ("flux", "wan", "sd15")
    for algorithm in ("lora", "loha", "lokr")
}
