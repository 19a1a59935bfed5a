"""Architecture entries against ComfyUI's own classes, detection and tables of diffusers' names."""

from __future__ import annotations

import json
import re
from typing import Any

import comfy.utils
import flux_kin
import make_models
import pytest
import torch
from adapter_lab.core.archs import ARCHITECTURES, ArchSpec, detect
from adapter_lab.core.keys import ModelIndex
from comfy import model_detection

KINDS = [(file, variant) for file, variants in flux_kin.MODELS.items() for variant in variants]
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
UNETS = ("sd15", "sd2", "sdxl")
# Entry -> ComfyUI's table of diffusers' names, its options from a model's.
_FLUX = comfy.utils.flux_to_diffusers
TABLES = {
    "flux2": (_FLUX, ("flux2", "dev"), dict(hidden_size=6144)),
    "flux": (_FLUX, ("flux", "dev"), dict(hidden_size=3072)),
    "sd3": (comfy.utils.mmdit_to_diffusers, ("sd3", "sd3-medium"), dict(depth=24, num_blocks=3)),
    "pixart": (comfy.utils.pixart_to_diffusers, ("pixart", "alpha"), dict(hidden_size=1152)),
    "auraflow": (comfy.utils.auraflow_to_diffusers, ("auraflow", "base"), {}),
}
# One table serves FLUX.1 and FLUX.2; names of the other are no names of this one.
# SD3's last block counts from the width there, and the list has fewer blocks.
EXCEPT = {
    "flux": r"linear_(in|out)\.|to_qkv_mlp_proj|attn\.to_out\.weight",
    "flux2": r"^single.*(attn\.to_[qkv]|proj_(mlp|out))\.|\.net\.|time_text_embed",
    "sd3": r"transformer_blocks\.2\.norm1_context",
}


def meanings(spec: ArchSpec, shapes: Any, name: str) -> set[tuple[str, int, int, bool]]:
    """(path, offset, length, in another order) of everything a diffusers name means."""
    found = [
        (alias, alias.own.format(*numbers)) for alias, numbers in spec.theirs_in(shapes).find(name)
    ]
    hidden = shapes[spec.hidden][0] if spec.hidden else 0
    return {
        (path, *alias.span(shapes[path][0], hidden), alias.order is not None)
        for alias, path in found
        if path in shapes
    }


@pytest.mark.parametrize(("file", "variant"), KINDS)
def test_lists_are_those_of_comfyuis_classes(file, variant):
    listed = json.loads((make_models.FOLDER / f"{file}.json").read_text("utf-8"))[variant]
    model = make_models.build(file, variant)
    index = ModelIndex(model.state_dict())
    assert {name: list(shape) for name, shape in index.items()} == listed
    spec = detect(index)
    layers = {name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    known = {
        name for name in index if (t := next(spec.own.find(name), None)) and t[0] in spec.layers
    }
    assert known == layers


# ComfyUI knows SDXL by the number of its transformer blocks, of which the list has fewer.
@pytest.mark.parametrize(("file", "variant"), [kind for kind in KINDS if kind[0] != "sdxl"])
def test_lists_are_of_models_that_comfyui_knows(file, variant):
    state = make_models.build(file, variant).state_dict()
    assert model_detection.model_config_from_unet(state, "") is not None


@pytest.mark.parametrize("kind", UNETS)
def test_unets_are_told_apart_and_named_as_comfyui_does(kind):
    _, options = make_models.MODELS[kind]["base"]
    index = ModelIndex(make_models.build(kind, "base").state_dict())
    spec = detect(index)
    assert spec is ARCHITECTURES[kind]
    table = comfy.utils.unet_to_diffusers(options)
    for pattern in (*spec.keep, *spec.excludes):
        assert any(re.fullmatch(pattern, path) for path in index), pattern
    for pattern in (pattern for patterns in spec.groups.values() for pattern in patterns):
        regex = re.escape(pattern).replace(r"\*", ".*")
        assert any(re.fullmatch(regex, path) for path in index) or "label" in regex, pattern
    compared = 0
    for theirs, own in table.items():
        path = own.removesuffix(".weight")
        if path != own and path in index:
            assert {m[0] for m in meanings(spec, index, theirs.removesuffix(".weight"))} == {path}
            compared += 1
    assert compared > 300


@pytest.mark.parametrize("kind", TABLES)
def test_rows_agree_with_comfyuis_tables(kind):
    convert, model, options = TABLES[kind]
    made = make_models.MODELS[model[0]][model[1]][1]
    index, spec = ModelIndex(make_models.build(*model).state_dict()), ARCHITECTURES[kind]
    compared = 0
    for theirs, target in convert({**made, **options}).items():
        own, span, *change = (target, None) if isinstance(target, str) else (*target,)
        path = own.removesuffix(".weight")
        if path == own or path not in index or re.search(EXCEPT.get(kind, "$^"), theirs):
            continue
        offset, length = (0, index[path][0]) if span is None else span[1:]
        expected = {(path, offset, length, bool(change))}
        assert meanings(spec, index, theirs.removesuffix(".weight")) == expected, theirs
        compared += 1
    assert compared > 25
