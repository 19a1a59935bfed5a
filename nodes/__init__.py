"""The nodes: thin classes over ``host`` and ``core``."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    bake,
    configure,
    dataset,
    demo,
    ema,
    extract,
    folder,
    inspect,
    load,
    magcache,
    magcache_plan,
    merge,
    objective,
    optimizer,
    preview,
    quantize,
    resize,
    run,
    save,
    targets,
    train,
)
from .host import paths


class AdapterLabExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def on_load(self) -> None:
        paths.register_demo_models()
        paths.serve_web_files()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        modules = (
            load, inspect, save, dataset, folder, configure, targets, optimizer, objective,
            preview, train, run, ema, merge, bake, extract, resize, magcache,
            magcache_plan, quantize, demo,
        )  # fmt: skip
        return [node for module in modules for node in module.NODES]
