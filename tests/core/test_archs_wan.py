"""Architecture tables of video, image and sound transformers against diffusers' own classes.

Every row of an own weight holds a number of its own, so that what diffusers' converters make of
the weights, or of the up factors of a LoRA, tells which rows of which weight each layer is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from adapter_lab.core.archs import ARCHITECTURES, ArchSpec, detect
from adapter_lab.core.keys.blocks import parse
from diffusers.loaders import lora_conversion_utils as lora_oracle
from diffusers.loaders import single_file_utils as oracle
from wan_models import (
    FACES,
    LAYERS,
    MODELS,
    OURS,
    THEIRS,
    VARIANTS,
    Shapes,
    Weights,
    find,
    meta,
    parameters,
    rows_of,
)  # fmt: skip


@pytest.fixture(scope="module", params=THEIRS, ids=" ".join)
def case(request: pytest.FixtureRequest):
    architecture, variant = request.param
    return ARCHITECTURES[architecture], MODELS[architecture][variant], meta(request.param)


def test_each_diffusers_weight_fits_the_rows_its_alias_says(case):
    spec, shapes, model = case
    reached: dict[str, list[int]] = defaultdict(list)
    for name, shape in parameters(model).items():
        if name.startswith(FACES):
            continue
        alias, path = find(spec, shapes, name)
        if alias.refuse:
            assert shape != shapes[path], name
            continue
        rows = rows_of(spec, shapes, alias, path)
        assert shape == (len(rows), *shapes[path][1:]), name
        reached[path] += rows.tolist()
    for path, rows in reached.items():
        assert sorted(rows) == list(range(shapes[path][0])), f"{path} is reached in part or twice"


def test_no_two_names_of_a_model_are_spelled_alike(case):
    """An underscored stem has one meaning: nothing of the model or of its aliases collides."""
    spec, shapes, model = case
    meanings: dict[str, set[object]] = defaultdict(set)
    for path in shapes:
        meanings[path.replace(".", "_")].add((path, None))
    for alias in spec.aliases:
        for n in range(2):
            path = alias.own.format(n, n)
            if path in shapes:
                theirs = alias.theirs.format(n, n).replace(".", "_")
                meanings[theirs].add((path, alias.rows))
    assert not {name: paths for name, paths in meanings.items() if len(paths) > 1}


# Converters of whole checkpoints. Prefix: of the released file, where the converter wants it.
CHECKPOINTS: dict[tuple[str, str], tuple[Callable[..., Weights], str]] = {
    **{("wan", v): (oracle.convert_wan_transformer_to_diffusers, "")
       for v in ("t2v", "i2v", "vace", "animate")},
    ("lumina2", "base"): (oracle.convert_lumina2_to_diffusers, ""),
    ("z_image", "base"): (oracle.convert_z_image_transformer_checkpoint_to_diffusers, ""),
    ("z_image", "omni"): (oracle.convert_z_image_transformer_checkpoint_to_diffusers, ""),
    ("ltxv", "base"): (oracle.convert_ltx_transformer_checkpoint_to_diffusers, ""),
    ("ltx2", "base"): (oracle.convert_ltx2_transformer_to_diffusers, ""),
    ("cosmos", "base"): (oracle.convert_cosmos_transformer_checkpoint_to_diffusers, "net."),
    ("cosmos_predict2", "base"): (oracle.convert_cosmos_transformer_checkpoint_to_diffusers, ""),
    ("krea2", "base"): (oracle.convert_krea2_transformer_checkpoint_to_diffusers, ""),
    ("ernie", "base"): (oracle.convert_ernie_image_transformer_checkpoint_to_diffusers, ""),
    ("minimax_h3", "base"): (oracle.convert_minimax_h3_transformer_checkpoint_to_diffusers, ""),
}  # fmt: skip


class Whole(dict[str, torch.Tensor]):
    """A checkpoint that stays whole: diffusers asks for Cosmos 1 in one that it has emptied."""

    pop = dict.get


def numbered(shapes: Shapes, prefix: str = "") -> dict[str, torch.Tensor]:
    """Each row a number that occurs nowhere else, as a module's weight and as a parameter."""
    count, state = 0, {}
    for name, shape in shapes.items():
        rows = torch.arange(count, count + shape[0]).view(-1, *[1] * (len(shape) - 1))
        state |= {f"{prefix}{name}.weight": rows, f"{prefix}{name}": rows.clone()}
        count += shape[0]
    return state


@pytest.mark.parametrize("case", CHECKPOINTS, ids=" ".join)
def test_diffusers_converter_takes_the_rows_the_alias_says(case):
    spec, shapes = ARCHITECTURES[case[0]], MODELS[case[0]][case[1]]
    shapes = {path: shape for path, shape in shapes.items() if not path.startswith(FACES)}
    convert, prefix = CHECKPOINTS[case]
    state = numbered(shapes)
    theirs = convert(Whole(numbered(shapes, prefix)), config={})
    checked = 0
    for name in parameters(meta(case)):
        if name.startswith(FACES):
            continue
        alias, path = find(spec, shapes, name)
        found = theirs.get(f"{name}.weight", theirs.get(name))
        assert found is not None, f"the converter makes no {name}"
        if not alias.refuse:
            expected = state[path][rows_of(spec, shapes, alias, path)]
            assert torch.equal(found, expected), f"{name} is not in {path} where it should be"
            checked += 1
    assert checked


def lora(shapes: Shapes, names: dict[str, str], prefix: str, kohya: bool) -> Weights:
    """A LoRA under ``names`` (own path -> name in the file) whose up factors hold row numbers."""
    down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    count, found = 0, {}
    for path, name in names.items():
        rows = shapes[path][0]
        numbers = torch.arange(count, count + rows, dtype=torch.float64).view(-1, 1)
        stem = prefix + (name.replace(".", "_") if kohya else name)
        found |= {f"{stem}.{down}.weight": torch.ones(1, 1, dtype=torch.float64),
                  f"{stem}.{up}.weight": numbers}  # fmt: skip
        if kohya:
            found[f"{stem}.alpha"] = torch.tensor(1.0)
        count += rows
    return found


def layers(spec: ArchSpec, shapes: Shapes, start: str = "") -> list[str]:
    """Own paths of the linear layers of what diffusers' transformer is."""
    beside = {alias.own for alias in spec.aliases if alias.family == "other"}
    beside -= {alias.own for alias in spec.aliases if alias.family == "diffusers"}
    return [
        path
        for path, shape in shapes.items()
        if len(shape) == 2 and path.startswith(start)
        and any(t in spec.layers and t not in beside for t, _ in spec.own.find(path))
    ]  # fmt: skip


# Converters of LoRA files. (architecture, variant, only paths from here on, kohya's keys)
LORAS = {
    lora_oracle._convert_non_diffusers_lumina2_lora_to_diffusers: (
        "lumina2", "base", "layers", False),
    lora_oracle._convert_non_diffusers_wan_lora_to_diffusers: ("wan", "i2v", "", False),
    lora_oracle._convert_musubi_wan_lora_to_diffusers: ("wan", "i2v", "blocks", True),
    lora_oracle._convert_non_diffusers_ltx2_lora_to_diffusers: ("ltx2", "2.3", "", False),
    lora_oracle._convert_non_diffusers_qwen_lora_to_diffusers: ("qwen_image", "base", "", True),
    lora_oracle._convert_non_diffusers_anima_lora_to_diffusers: ("anima", "base", "", False),
    lora_oracle._convert_non_diffusers_ideogram4_lora_to_diffusers: (
        "ideogram4", "base", "layers", False),
    lora_oracle._convert_non_diffusers_krea2_lora_to_diffusers: ("krea2", "base", "", False),
    lora_oracle._convert_non_diffusers_minimax_h3_lora_to_diffusers: (
        "minimax_h3", "base", "", True),
}  # fmt: skip


@pytest.mark.parametrize("convert", LORAS, ids=lambda f: f.__name__.strip("_"))
def test_diffusers_lora_converter_agrees_with_the_aliases(convert):
    name, variant, start, kohya = LORAS[convert]
    spec, shapes = ARCHITECTURES[name], MODELS[name][variant]
    paths = layers(spec, shapes, start)
    prefix = "lora_unet_" if kohya else "diffusion_model."
    source = lora(shapes, {path: path for path in paths}, prefix, kohya)
    up = "lora_up" if kohya else "lora_B"
    stems = {path: prefix + (path.replace(".", "_") if kohya else path) for path in paths}
    numbers = {path: source[f"{stem}.{up}.weight"] for path, stem in stems.items()}
    result = convert(dict(source))
    reached = set()
    for key, value in result.items():
        theirs = key.removeprefix("transformer.")
        if not theirs.endswith(".lora_B.weight"):
            continue
        alias, path = find(spec, shapes, theirs.removesuffix(".lora_B.weight"))
        assert torch.equal(value, numbers[path][rows_of(spec, shapes, alias, path)]), key
        reached.add(path)
    assert reached == set(paths)


def test_ace_step_names_of_the_released_trainer():
    """diffusers renames what the trainer of the released code writes for the decoder alone."""
    spec, shapes = ARCHITECTURES["ace_step15"], MODELS["ace_step15"]["base"]
    convert = lora_oracle._convert_non_diffusers_ace_step_lora_to_diffusers
    paths = [path for path in shapes if path.startswith("decoder.layers.") and "attn." in path]
    paths = [path for path in paths if len(shapes[path]) == 2]
    for path in paths:
        released = path.removeprefix("decoder.")
        (key,) = convert({f"base_model.model.{released}.lora_A.weight": torch.zeros(1)})
        theirs = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        assert find(spec, shapes, released)[1] == path
        assert find(spec, shapes, theirs)[1] == path
    assert paths


@pytest.mark.parametrize("case", VARIANTS, ids=" ".join)
def test_detects_the_model_and_nothing_else(case):
    spec, shapes = ARCHITECTURES[case[0]], MODELS[case[0]][case[1]]
    assert [s.id for s in ARCHITECTURES.values() if s.detect(shapes)] == [spec.id]
    assert detect(shapes) is spec
    assert detect({f"net.{name}": shape for name, shape in shapes.items()}) is None


def test_layers_are_the_linear_and_convolution_layers_of_diffusers(case):
    """Which of ComfyUI's modules are layers is compared with its classes in tests/host."""
    spec, shapes, model = case
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None and not name.startswith(FACES):
            own = find(spec, shapes, name)[0].own
            assert (own in spec.layers) is isinstance(module, LAYERS), name


@pytest.mark.parametrize("name", OURS)
def test_groups_and_blocks_hit_modules(name):
    spec = ARCHITECTURES[name]
    paths = {path for shapes in MODELS[name].values() for path in shapes}
    assert {"attention", "mlp", "modulation"} <= set(spec.groups)
    for group in spec.groups:
        weights = parse(f"@{group} = 0.5", spec)
        hit = {path for path in paths if weights.weight_of(path) == 0.5}
        assert hit and hit != paths, group


@pytest.mark.parametrize("name", OURS)
def test_keeps_what_is_sensitive_and_not_what_is_big(name):
    """Norms stay in high precision; the attention of the first kind of blocks does not."""
    spec = ARCHITECTURES[name]
    attention = parse("@attention = 0.5", spec)
    shapes = {path: shape for found in MODELS[name].values() for path, shape in found.items()}
    inside = re.compile(rf"(?:{spec.blocks[0]})\..+")
    quantised = 0
    for path, shape in shapes.items():
        kept = any(re.fullmatch(pattern, path) for pattern in spec.keep)
        layer = any(template in spec.layers for template, _ in spec.own.find(path))
        gate = path.endswith("to_gate_logits")
        if inside.fullmatch(path) and layer and not gate:
            assert not (kept and attention.weight_of(path) == 0.5), path
            quantised += not kept
        elif len(shape) == 1 and "norm" in path:
            assert kept, path
    assert quantised
