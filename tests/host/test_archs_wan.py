"""Architecture tables of video, image and sound transformers against ComfyUI's own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.utils
import make_models as recorder
import pytest
import torch
import wan_kin
from adapter_lab.core.archs import ARCHITECTURES, ArchSpec

DATA = Path(__file__).resolve().parents[1] / "data"

VARIANTS = [(name, variant) for name, found in wan_kin.MODELS.items() for variant in found]
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def recorded(name: str, variant: str) -> dict[str, list[int]]:
    return json.loads((DATA / "models" / f"{name}.json").read_text("utf-8"))[variant]


@pytest.mark.parametrize("case", VARIANTS, ids=" ".join)
def test_recorded_names_and_shapes_are_those_of_comfyui(case):
    assert recorder.shapes(*case) == recorded(*case)


@pytest.mark.parametrize("case", VARIANTS, ids=" ".join)
def test_layers_are_the_linear_and_convolution_layers(case):
    spec, model = ARCHITECTURES[case[0]], recorder.build(*case)
    made = {name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    known = {path for path in recorded(*case) if is_layer(spec, path)}
    # Blurs faces of Wan Animate's driving video; nobody trains it.
    assert {name for name in made if not name.startswith("motion_encoder.")} == known


def is_layer(spec: ArchSpec, path: str) -> bool:
    return any(template in spec.layers for template, _ in spec.own.find(path))


def agree(spec: ArchSpec, shapes: dict[str, list[int]], table: dict[str, Any]) -> int:
    """How many names ComfyUI's table puts where the aliases do; each that the model has."""
    index = {path: tuple(shape) for path, shape in shapes.items()}
    aliases, agreed = spec.theirs_in(index), 0
    for theirs, to in table.items():
        own, span = (to, None) if isinstance(to, str) else (to[0], to[1])
        path = own.removesuffix(".weight")
        if path not in index or theirs.endswith(".bias"):
            continue
        found = [
            (alias, alias.own.format(*numbers))
            for alias, numbers in aliases.find(theirs.removesuffix(".weight"))
        ]
        ((alias, reached),) = found
        assert reached == path, theirs
        rows = index[path][0]
        whole = (0, 0, rows)
        assert (0, *alias.span(rows, index[spec.hidden][0] if spec.hidden else 0)) == (
            span or whole
        ), theirs
        assert not alias.refuse and alias.order is None
        agreed += 1
    return agreed


def test_agrees_with_comfyui_on_krea2():
    table = comfy.utils.krea2_to_diffusers({"layers": 2})
    assert agree(ARCHITECTURES["krea2"], recorded("krea2", "base"), table) > 50


def test_agrees_with_comfyui_on_z_image():
    table = comfy.utils.z_image_to_diffusers({"n_layers": 2, "dim": 3840})
    assert agree(ARCHITECTURES["z_image"], recorded("z_image", "base"), table) > 70
