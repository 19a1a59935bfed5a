"""From a file to matched weights, beside ComfyUI: its key map and its walk over it.

Both read the file, find the weight of every module and make its patch; neither patches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host

import comfy.lora  # isort: skip
import comfy.model_base
import comfy.supported_models
import comfy.utils
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.keys import ModelIndex, resolve
from adapter_lab.core.train.random import generator
from adapter_lab.nodes.host.model import index
from pairs import timed
from torch import nn

PAIRS, RANK = 15, 4


def _plain(aliases: int) -> tuple[Any, list[str]]:
    """A model of so many names, each with two aliases in ComfyUI's map, and 48 of its modules."""
    network = nn.Module()
    network.blocks = nn.ModuleList(
        nn.Linear(64, 64, bias=False, device="meta") for _ in range(aliases // 2)
    )
    model = nn.Module()
    model.diffusion_model, model.model_config = network, SimpleNamespace(unet_config={})
    return model, [f"diffusion_model.blocks.{n}" for n in range(48)]


def _sdxl() -> tuple[Any, list[str]]:
    """SDXL's UNet without memory, and 743 of its layers in kohya's spelling."""
    options = {
        **comfy.supported_models.SDXL.unet_config, "image_size": 32, "in_channels": 4,
        "out_channels": 4, "num_res_blocks": [2, 2, 2], "channel_mult": (1, 2, 4),
        "num_head_channels": 64, "use_spatial_transformer": True, "num_classes": "sequential",
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "legacy": False,
        "transformer_depth_middle": 10,
    }  # fmt: skip
    config = comfy.supported_models.SDXL({**options, "dtype": torch.float16})
    model = comfy.model_base.SDXL(config, device=torch.device("meta"))
    kinds = (nn.Linear, nn.Conv2d)
    names = [n for n, m in model.diffusion_model.named_modules() if isinstance(m, kinds)]
    attention = [n for n in names if "transformer_blocks" in n or "proj_" in n]
    chosen = [*attention, *(n for n in names if n not in attention)][:743]
    return model, ["lora_unet_" + n.replace(".", "_") for n in chosen]


def _file(model: Any, stems: list[str]) -> Path:
    shapes = {n.removesuffix(".weight"): tuple(p.shape) for n, p in model.named_parameters()}
    kohya = {"lora_unet_" + n[len("diffusion_model.") :].replace(".", "_"): n for n in shapes}
    tensors = {}
    for stem in stems:
        shape = shapes[kohya.get(stem, stem)]
        made = ALGORITHMS["lora"].init(shape, AdapterConfig(rank=RANK), generator(0, stem))
        tensors |= {f"{stem}.{suffix}": t.half() for suffix, t in made.state().items()}
    path = host.FOLDER / f"match{len(stems)}.safetensors"
    write_adapter(path, Adapter(tensors))
    return path


def _bench(make: Callable[[], tuple[Any, list[str]]], known: bool) -> Callable[..., None]:
    """``known``: the names of the model are collected before, only reading and matching count."""

    def bench(measure: Callable[..., None]) -> None:
        model, stems = make()
        path = _file(model, stems)

        def names() -> ModelIndex:
            return index(SimpleNamespace(model=model, backup={}))

        def key_map() -> dict[str, str]:
            return comfy.lora.model_lora_keys_unet(model, {})

        own, theirs = (names(), key_map()) if known else (None, None)

        def ours() -> None:
            _, report = resolve(read_adapter(path), own or names())
            assert len(report.matched) == len(stems)

        def peer() -> None:
            tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
            assert len(comfy.lora.load_lora(tensors, theirs or key_map())) == len(stems)

        measure(timed(ours), timed(peer), "ComfyUI", "s", PAIRS)

    return bench


BENCHES = {
    "match_48_of_500": _bench(lambda: _plain(500), known=True),
    "match_48_of_8000": _bench(lambda: _plain(8000), known=True),
    "match_sdxl": _bench(_sdxl, known=False),
}
