"""What any tool must do at least, and the obvious way to do it, for ``child.py``."""

from __future__ import annotations

from safetensors.torch import load_file, save_file


def start() -> None:
    """Nothing is held before the first call."""


def copy(paths: list[str], out: str) -> None:
    """Read every byte, write as many as one file has."""
    data = b""
    for path in paths:
        with open(path, "rb") as file:
            data = file.read()
    with open(out, "wb") as file:
        file.write(data)


def bake(model: str, adapter: str, out: str) -> None:
    """Load the model, add each delta in float32, save; kohya's names of dotted ones."""
    weights, lora = load_file(model), load_file(adapter)
    for key in list(weights):
        stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        if f"{stem}.alpha" in lora:
            up, down = (lora[f"{stem}.lora_{side}.weight"].float() for side in ("up", "down"))
            scale = float(lora[f"{stem}.alpha"]) / len(down)
            weights[key] = (weights[key].float() + scale * (up @ down)).to(weights[key].dtype)
    save_file(weights, out)
