"""Writes models/<architecture>.json: what ComfyUI's classes call their weights, and their shapes.

Run with an environment where ``comfy`` imports: ``python make_models.py [ARCHITECTURE ...]``.
Published widths, two blocks of each kind; biases that stand beside a weight are left out, and a
module's weight is listed under the module's own name, as in a model index.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
import flux_kin
import wan_kin

FOLDER = Path(__file__).resolve().parent / "models"
MODELS = flux_kin.MODELS | wan_kin.MODELS


def build(architecture: str, variant: str) -> Any:
    """ComfyUI's own class on the meta device."""
    import comfy.ops
    import torch

    dotted, options = MODELS[architecture][variant]
    module, _, name = dotted.rpartition(".")
    made = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    fixed = dict(operations=comfy.ops.disable_weight_init, dtype=torch.bfloat16, device="meta")
    return made(**fixed | options)


def shapes(architecture: str, variant: str) -> dict[str, list[int]]:
    """Module path, or name of a raw parameter -> shape."""
    state = build(architecture, variant).state_dict()
    return {
        name.removesuffix(".weight"): list(tensor.shape)
        for name, tensor in state.items()
        if not name.endswith(".bias") or f"{name[:-4]}weight" not in state
    }


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for architecture in names or MODELS:
        found = {variant: shapes(architecture, variant) for variant in MODELS[architecture]}
        lines = [
            f'"{variant}": {{\n' + ",\n".join(f'"{k}":{v}' for k, v in modules.items()) + "\n}"
            for variant, modules in found.items()
        ]
        text = "{\n" + ",\n".join(lines).replace(", ", ",") + "\n}\n"
        json.loads(text)
        (FOLDER / f"{architecture}.json").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
