"""Layers chosen to be quantised, in the models that ComfyUI itself makes and tells apart.

Published widths, two blocks of each kind, on the meta device: nothing is computed.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

import comfy.model_detection
import comfy.ops
import make_models
import pytest
import torch
from adapter_lab.core.archs import ARCHITECTURES
from adapter_lab.core.header import Header, TensorInfo
from adapter_lab.core.merge.bake_plan import Plan
from adapter_lab.core.merge.outcome import Outcome
from adapter_lab.core.quant.choose import choose
from adapter_lab.core.quant.formats import FORMATS, MARKER
from comfy.quant_ops import QuantizedTensor

# Models that nothing here describes.
UNKNOWN = {
    "hunyuan3d": ("hunyuan3d.model.Hunyuan3Dv2", {}),
    "hunyuan3d_moe": ("hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain", {}),
    "stable_audio": ("audio.dit.AudioDiffusionTransformer", {}),
    "pixeldit": ("pixeldit.pid.PidNet", {}),
    "triposplat": ("triposplat.model.LatentSeqMMFlowModel", {}),
    "sam3": ("sam3.detector.SAM3Model", {}),
}
MODELS = make_models.MODELS | {"unknown": UNKNOWN}
KINDS = [(kind, variant) for kind, variants in MODELS.items() for variant in variants]
# Two blocks are too few for ComfyUI to know them, or options are not those of a published model.
UNTOLD = [("sdxl", "base"), ("wan", "camera")]
ODD = ("omnigen2",)  # 2520 wide, which no packed format fits
State = dict[str, torch.Tensor]


def chosen(state: State, kind: str, form: str) -> dict[str, str]:
    """Name of a weight -> path, of the layers that would be quantised."""
    infos, end = {}, 0
    for key, tensor in state.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        infos[key] = TensorInfo("BF16", tuple(tensor.shape), start, end)
    reader: Any = SimpleNamespace(header=Header(infos, {}, 0, end), path="model.safetensors")
    plan, spec = Plan(reader, Outcome(), None), None if kind == "unknown" else ARCHITECTURES[kind]
    assert plan.index.architecture is spec
    return choose(plan, FORMATS[form], spec, []).chosen


def quantised(state: State, names: dict[str, str], form: str) -> State:
    """The state with these weights in a format, without numbers."""
    found, known = dict(state), FORMATS[form]
    for key in names:
        plain, layer = found.pop(key), key.removesuffix("weight")
        shape = tuple(plain.shape)
        for part, (dtype, size) in known.layout(shape).items():
            found[layer + part] = torch.empty(size, dtype=dtype, device=plain.device)
        found[layer + MARKER] = known.marker(shape)
    return found


@cache
def unquantised(kind: str, variant: str) -> torch.nn.Module:
    return build(kind, variant, comfy.ops.disable_weight_init)


def build(kind: str, variant: str, operations: Any) -> torch.nn.Module:
    dotted, options = MODELS[kind][variant]
    module, _, name = dotted.rpartition(".")
    made = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    return made(**dict(operations=operations, dtype=torch.bfloat16, device="meta") | options)


@pytest.mark.parametrize(("kind", "variant"), KINDS)
def test_every_chosen_layer_takes_its_format(kind: str, variant: str) -> None:
    """ComfyUI's loading makes a quantised weight of each, and nothing is left over."""
    state = unquantised(kind, variant).state_dict()
    model = build(kind, variant, comfy.ops.mixed_precision_ops({}, torch.bfloat16))
    names = chosen(state, kind, "int8_row")
    left = model.load_state_dict(quantised(state, names, "int8_row"), strict=False, assign=True)
    assert not left.unexpected_keys
    for path in names.values():
        assert isinstance(model.get_submodule(path).weight, QuantizedTensor), path


@pytest.mark.parametrize(("kind", "variant"), KINDS)
def test_no_code_reads_the_weight_of_a_chosen_layer(kind: str, variant: str) -> None:
    """It would find codes without their scales."""
    model = unquantised(kind, variant)
    readers = []
    for path in chosen(model.state_dict(), kind, "int8_row").values():
        names = path.split(".")
        leaf = [name for name in names if not name.isdecimal()][-1]
        for end in range(len(names)):
            owner = type(model.get_submodule(".".join(names[:end])))
            if owner.__module__.startswith("comfy.ldm."):
                readers += _readers(owner, leaf)
    assert set(readers) == set()


@cache
def _readers(owner: type, leaf: str) -> list[str]:
    # A type is the model's own whatever the weight is stored in.
    text = inspect.getsource(sys.modules[owner.__module__])
    found = re.findall(rf"\.{leaf}(?:\[\w+\])*\.weight(?!\.dtype)\b.*", text)
    return [f"{owner.__module__}: {line}" for line in found]


@pytest.mark.parametrize("form", ["int8_row", "nvfp4"])
@pytest.mark.parametrize(("kind", "variant"), KINDS)
def test_the_model_is_told_by_what_is_left(kind: str, variant: str, form: str) -> None:
    """Settings that ComfyUI takes from names and sizes are those of the plain file, and what it
    does to the weights while it loads leaves the scales beside them."""
    state = unquantised(kind, variant).state_dict()
    form = "int8_row" if kind in ODD else form
    names = chosen(state, kind, form)
    small = quantised(state, names, form)
    plain = comfy.model_detection.detect_unet_config(state, "")
    assert comfy.model_detection.detect_unet_config(small, "") == plain
    if (kind, variant) in UNTOLD:
        return
    config = comfy.model_detection.model_config_from_unet(small, "")
    assert config.quant_config == {"mixed_ops": True}
    loaded = config.process_unet_state_dict(dict(small))
    for path in names.values():
        for part in (*FORMATS[form].layout((128, 128)), MARKER):
            assert loaded[f"{path}.{part}"] is small[f"{path}.{part}"], path
