"""Every module that real trainers write for video, image and sound transformers is found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_lab.core.archs import ARCHITECTURES, ArchSpec, detect_stems
from adapter_lab.core.keys import resolve
from wan_models import LAYERS, MODELS, OURS, THEIRS, VARIANTS, Shapes, Weights, meta, parameters

# What trainers and libraries wrote: tensor names and shapes, two blocks of each kind.
FILES = {
    file.stem: found
    for file in sorted((Path(__file__).resolve().parents[1] / "data" / "keys").glob("*.json"))
    if (found := json.loads(file.read_text("utf-8")))["architecture"] in OURS
}


@pytest.mark.parametrize("name", FILES)
def test_every_module_of_a_real_file_resolves(name):
    found = FILES[name]
    architecture = found["architecture"]
    # The first variant, or one whose layers the file names as well.
    shapes = MODELS[architecture][found.get("variant", next(iter(MODELS[architecture])))]
    one = torch.ones(())
    tensors = {key: one.expand(shape) for key, shape in found["keys"].items()}
    index = {f"diffusion_model.{path}.weight": shape for path, shape in shapes.items()}
    entries, report = resolve(tensors, index)
    assert not report.unmatched, dict(list(report.unmatched.items())[:3])
    assert len({(entry.key, entry.slice) for entry in entries}) == len(report.matched) > 4
    assert report.architecture == report.file_architecture == architecture


TRAINERS = [name for name in FILES if name.endswith(("_musubi_lora", "_kohya"))]


@pytest.mark.parametrize("name", TRAINERS)
def test_blocks_and_excludes_choose_what_trainers_choose(name):
    """The layers in blocks that musubi-tuner and sd-scripts train by default; some train others,
    outside of blocks, as well.
    """
    spec, found = ARCHITECTURES[FILES[name]["architecture"]], FILES[name]
    shapes = MODELS[spec.id][found["variant"]]
    one = torch.ones(())
    tensors = {key: one.expand(shape) for key, shape in found["keys"].items()}
    entries, _ = resolve(tensors, {f"diffusion_model.{p}.weight": s for p, s in shapes.items()})
    inside = [re.compile(rf"(?:{block})\..+") for block in spec.blocks]
    chosen = {
        path
        for path in shapes
        if any(template in spec.layers for template, _ in spec.own.find(path))
        and any(block.fullmatch(path) for block in inside)
        and not any(re.fullmatch(exclude, path) for exclude in spec.excludes)
    }
    trained = {entry.path for entry in entries}
    assert {path for path in trained if any(b.fullmatch(path) for b in inside)} == chosen
    assert chosen


def stems(spec: ArchSpec, shapes: Shapes, model: torch.nn.Module | None) -> dict[str, list[str]]:
    """Producer -> stems of the layers as it spells them."""
    own = [path for path in shapes if any(t in spec.layers for t, _ in spec.own.find(path))]
    found = {
        "comfyui": [f"diffusion_model.{path}" for path in own],
        "kohya": ["lora_unet_" + path.replace(".", "_") for path in own],
    }
    if model is not None:
        theirs = [name for name, m in model.named_modules() if isinstance(m, LAYERS)]
        found |= {
            "diffusers": [f"transformer.{name}" for name in theirs],
            "peft": [f"base_model.model.{name}" for name in theirs],
            "bare": theirs,
            "lycoris": ["lycoris_" + name.replace(".", "_") for name in theirs],
            "ai-toolkit": [f"diffusion_model.{name}" for name in theirs],
            "kohya, diffusers' names": ["lora_unet_" + n.replace(".", "_") for n in theirs],
        }
    return found


def factors(names: list[str], shape: Callable[[str], tuple[int, ...]]) -> Weights:
    """An adapter of rank 1 that fits; no memory behind it."""
    zero, found = torch.zeros(1), {}
    for name in names:
        out, into, *kernel = shape(name)
        found[f"{name}.lora_up.weight"] = zero.expand(out, 1, *[1] * len(kernel))
        found[f"{name}.lora_down.weight"] = zero.expand(1, into, *kernel)
    return found


@pytest.mark.parametrize("case", VARIANTS, ids=" ".join)
def test_every_stem_resolves_and_fits(case):
    spec, shapes = ARCHITECTURES[case[0]], MODELS[case[0]][case[1]]
    model = meta(case) if case in THEIRS else None
    theirs = parameters(model) if model is not None else {}
    spelled = shapes | {path.replace(".", "_"): shape for path, shape in shapes.items()}
    spelled |= theirs | {name.replace(".", "_"): shape for name, shape in theirs.items()}
    index = {f"diffusion_model.{path}.weight": shape for path, shape in shapes.items()}
    prefixes = ("diffusion_model.", "transformer.", "base_model.model.", "lora_unet_", "lycoris_")
    for producer, names in stems(spec, shapes, model).items():

        def shape(name: str) -> tuple[int, ...]:
            start = next((p for p in prefixes if name.startswith(p)), "")
            return spelled[name[len(start) :]]

        entries, report = resolve(factors(names, shape), index)
        assert not report.unmatched, f"{producer}: {dict(list(report.unmatched.items())[:3])}"
        assert len(entries) == len(names)
        assert report.architecture == report.file_architecture == spec.id


@pytest.mark.parametrize("case", THEIRS, ids=" ".join)
def test_stems_alone_tell_the_architecture(case):
    # Their names are one and the same; metadata or the model decides.
    twins = {"cosmos": "anima", "cosmos_predict2": "anima"}
    spec, shapes = ARCHITECTURES[case[0]], MODELS[case[0]][case[1]]
    kinds = stems(spec, shapes, meta(case))
    for separator, kind in ((".", "bare"), ("_", "lycoris")):
        names = [name.removeprefix("lycoris_") for name in kinds[kind]]
        found = detect_stems(names)
        assert found and found.id == twins.get(spec.id, spec.id), separator
        for version in spec.base_versions:
            assert detect_stems(names, {"ss_base_model_version": version}) is spec
