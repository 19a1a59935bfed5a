"""What any tool must do at least, and the obvious way to do it, for ``child.py``."""

from __future__ import annotations

import torch
from adapter_lab.core.streams import stream, write_stream
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


def quantize(model: str, out: str, form: str) -> None:
    """Read each weight, cast it to 8 bits without a scale, write it: what ``form`` costs at least.

    It goes to the disk before the file has its name, as ours does.
    """
    del form
    cast = torch.float8_e4m3fn
    infos = {name: (cast, tuple(tensor.shape)) for name, tensor in stream(model)}
    write_stream(out, infos, ((n, t.to(cast)) for n, t in stream(model)), hashes=False)
