"""Files of other tools against what diffusers makes of them: the same change of every weight.

diffusers renames and splits such a file before it loads it. What that comes to and what the file
itself comes to must be the same, module by module and row by row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from adapter_lab.core.archs import ARCHITECTURES
from adapter_lab.core.keys import resolve
from diffusers.loaders import lora_conversion_utils as oracle

KEYS = Path(__file__).resolve().parents[1] / "data" / "keys"
MODELS = KEYS.parent / "models"
WIDTH = 4  # of every weight here; rows keep their number
SMALLEST = 5  # modules a list has at least
Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]

XLABS = {
    **{f"double_blocks.0.processor.{x}_lora{i}": f"double_blocks.0.{s}_attn.{x}"
       for i, s in ((1, "img"), (2, "txt")) for x in ("qkv", "proj")},
    "single_blocks.0.processor.qkv_lora": "single_blocks.0.linear1",
    "single_blocks.0.processor.proj_lora": "single_blocks.0.linear2",
}  # fmt: skip


def model(name: str, variant: str) -> Shapes:
    listed = json.loads((MODELS / f"{name}.json").read_text("utf-8"))[variant]
    return {path: (shape[0], WIDTH) for path, shape in listed.items() if len(shape) > 1}


def lora(rows: dict[str, int], up: str, down: str, alpha: bool = False) -> State:
    """A LoRA of rank 2 with random factors: stem -> number of rows."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}
    for stem, n in rows.items():
        state[f"{stem}.{down}"] = torch.randn(2, WIDTH, generator=generator)
        state[f"{stem}.{up}"] = torch.randn(n, 2, generator=generator)
        state |= {f"{stem}.alpha": torch.tensor(1.0)} if alpha else {}
    return state


def changes(adapter: State, shapes: Shapes) -> State:
    """Weight -> the whole change of it."""
    index = {f"diffusion_model.{path}.weight": shape for path, shape in shapes.items()}
    entries, report = resolve(adapter, index)
    assert report.unmatched == {}
    found: State = {}
    for entry in entries:
        weight = torch.zeros(shapes[entry.path])
        axis, offset, length = entry.slice or (0, 0, len(weight))
        delta = entry.algorithm.delta(weight[offset : offset + length])
        found.setdefault(entry.path, weight)[offset : offset + length] += delta
    return found


def listed(name: str) -> Iterable[tuple[str, int]]:
    """(stem, number of rows) of the LoRA modules in a key list."""
    keys = json.loads((KEYS / f"{name}.json").read_text("utf-8"))["keys"]
    for key, shape in keys.items():
        if key.endswith("lora_up.weight"):
            yield key.removesuffix(".lora_up.weight"), shape[0]


def inside(shapes: Shapes, *starts: str) -> dict[str, int]:
    return {path: shape[0] for path, shape in shapes.items() if path.startswith(starts)}


def released(shapes: Shapes) -> dict[str, int]:
    """HunyuanVideo's layers under the names of its released code.

    Not the last modulation, whose halves diffusers swaps in both factors.
    """
    whole = [a for a in ARCHITECTURES["hunyuan_video"].aliases if a.family == "original"]
    theirs = {alias.own: alias.theirs for alias in whole if alias.rows is None}
    found: dict[str, int] = {}
    for path, n in inside(
        shapes, "double_blocks.0.", "single_blocks.0.", "final_layer.linear"
    ).items():
        name = theirs.get(path.replace(".0.", ".{}.", 1), path.replace(".0.", ".{}.", 1))
        found[f"transformer.{name.format(0)}"] = n
    return found


def xlabs() -> State:
    shapes = model("flux", "dev")
    qkv = {stem: 9216 if "qkv" in stem else shapes[path][0] for stem, path in XLABS.items()}
    return lora(qkv, "up.weight", "down.weight")


def kohya(name: str) -> State:
    return lora(dict(listed(name)), "lora_up.weight", "lora_down.weight", alpha=True)


def plain(rows: dict[str, int], prefix: str = "") -> State:
    rows = {prefix + stem: n for stem, n in rows.items()}
    return lora(rows, "lora_B.weight", "lora_A.weight")


# name -> (model, variant, file, diffusers' conversion)
CASES = {
    "xlabs": ("flux", "dev", xlabs, "xlabs_flux_lora"),
    "kohya flux": ("flux", "dev", lambda: kohya("flux_kohya"), "kohya_flux_lora"),
    "musubi kontext": ("flux", "dev", lambda: kohya("flux_musubi_lora"), "kohya_flux_lora"),
    "musubi flux2": ("flux2", "dev", lambda: kohya("flux2_musubi_lora"), "kohya_flux2_lora"),
    "ai-toolkit flux2": (
        "flux2", "dev",
        lambda: plain(inside(model("flux2", "dev"), "double_blocks.0.", "single_blocks.0."),
                      "diffusion_model."),
        "non_diffusers_flux2_lora",
    ),
    "diffusion-pipe hunyuan video": (
        "hunyuan_video", "t2v", lambda: plain(released(model("hunyuan_video", "t2v"))),
        "hunyuan_video_lora",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_file_and_what_diffusers_makes_of_it_change_the_same(name):
    architecture, variant, make, convert = CASES[name]
    shapes, adapter = model(architecture, variant), make()
    converted = getattr(oracle, f"_convert_{convert}_to_diffusers")(dict(adapter))
    converted = {
        key if key.startswith("transformer.") else f"transformer.{key}": tensor.contiguous()
        for key, tensor in converted.items()
        if tensor is not None
    }
    ours, theirs = changes(adapter, shapes), changes(converted, shapes)
    assert len(ours) >= SMALLEST and ours.keys() == theirs.keys()
    for path, change in ours.items():
        assert torch.allclose(change, theirs[path], atol=1e-5), path
        assert change.abs().max() > 0.1
