"""Which modules a choice of targets trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from adapter_lab.core.archs import ARCHITECTURES, Templates, detect, wildcard
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.keys import ModelIndex, resolve
from adapter_lab.core.train.targets import DIFFUSION, Targets, file_stem

DATA = Path(__file__).resolve().parents[1] / "data"
NAMES = [
    "img_in",
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_mod.lin",
    "double_blocks.0.img_mlp.0",
    "single_blocks.12.linear1",
    "single_blocks.12.modulation.lin",
    "final_layer.linear",
]
FLUX = ARCHITECTURES["flux"]
LAYERS = {DIFFUSION + name: (4, 4) for name in NAMES}
NORM = DIFFUSION + "double_blocks.0.img_attn.norm.query_norm"
MUSUBI = sorted((DATA / "keys").glob("*_musubi_*.json"))
CLIP = "clip_l.transformer.text_model.encoder.layers.0."
T5 = "t5xxl.transformer.encoder.block.3.layer."
LLM = "qwen25_7b.transformer."
ENCODERS = {
    **{CLIP + leaf: (4, 4) for leaf in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")},
    CLIP + "layer_norm1": (4,),
    "clip_l.transformer.text_projection": (4, 4),
    **{T5 + leaf: (4, 4) for leaf in ("0.SelfAttention.q", "1.DenseReluDense.wi_0")},
    **{LLM + leaf: (4, 4) for leaf in (
        "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.lm_head",
        "visual.blocks.0.attn.qkv", "visual.layers.0.mlp.fc1",
    )},
}  # fmt: skip


def models():
    """(file, variant) of every listed model."""
    files = sorted((DATA / "models").glob("*.json"))
    return [(file.stem, variant) for file in files for variant in json.loads(file.read_text())]


def listed(name, variant):
    """(entry, index, full path -> shape of every layer) of a listed model."""
    shapes = json.loads((DATA / "models" / f"{name}.json").read_text())[variant]
    index = ModelIndex({f"{DIFFUSION}{path}.weight": tuple(s) for path, s in shapes.items()})
    spec = detect(index)
    known = Templates((layer, layer) for layer in spec.layers)
    layers = {
        DIFFUSION + path: tuple(shape)
        for path, shape in shapes.items()
        if len(shape) > 1 and any(known.find(path))
    }
    return spec, index, layers


def general(paths):
    """Names inside the model with their numbers as ``*``."""
    return {wildcard(path.removeprefix(DIFFUSION))[0] for path in paths}


def names(targets, layers=None, arch=FLUX):
    chosen = targets.choose(LAYERS if layers is None else layers, arch)
    return [path.removeprefix(DIFFUSION) for path in chosen]


def test_presets():
    attention_and_mlp = [NAMES[1], NAMES[3], NAMES[4]]
    assert names(Targets("default")) == attention_and_mlp
    assert names(Targets("all blocks")) == NAMES[1:6]
    assert names(Targets("everything")) == NAMES
    assert names(Targets("attention only")) == [NAMES[1]]
    assert names(Targets("MLP only")) == [NAMES[3]]


@pytest.mark.parametrize("file", MUSUBI, ids=[file.stem for file in MUSUBI])
def test_default_is_what_musubi_trains(file):
    """The keys of musubi-tuner's own networks over its own classes, found in ComfyUI's."""
    theirs = json.loads(file.read_text())
    spec, index, layers = listed(theirs["architecture"], theirs["variant"])
    state = {
        key: torch.empty(shape, device="meta") if shape else torch.tensor(1.0)
        for key, shape in theirs["keys"].items()
    }
    entries, report = resolve(state, index, spec)
    assert not report.unmatched
    ours = Targets("default").choose(layers, spec)
    assert general(ours) == general(entry.path for entry in entries)


# A layer of diffusers' that is attention or MLP and nothing else.
ATTENTION = re.compile(r".*attn\d?\.(?:to|add)_(?:q|k|v|out|[qkv]_proj|add_out)(?:\.\d)?")
MLP = re.compile(r".*\.(?:audio_)?(?:ff|ff_context|feed_forward|ffn)\.(?:net|linear_[123]).*")


@pytest.mark.parametrize(("name", "variant"), models())
def test_roles_are_those_of_diffusers(name, variant):
    spec, index, layers = listed(name, variant)
    aliases: dict[str, set[str]] = {}
    for alias in spec.layout(index) if spec.layout else spec.aliases:
        if alias.family == "diffusers" and "norm_" not in alias.theirs:
            aliases.setdefault(wildcard(alias.own.replace("{}", "0"))[0], set()).add(alias.theirs)
    whole = Targets("all blocks").choose(layers, spec)
    for preset, role in (("attention only", ATTENTION), ("MLP only", MLP)):
        chosen = general(Targets(preset, default_excludes=False).choose(layers, spec))
        assert chosen <= general(whole)
        for own in general(whole) & aliases.keys():
            # The second layer of these is after attention and MLP both.
            if not own.startswith("single_blocks.") and all(map(role.fullmatch, aliases[own])):
                assert own in chosen


@pytest.mark.parametrize(("name", "variant"), models())
def test_attention_and_mlp_are_apart_and_no_modulation(name, variant):
    spec, _, layers = listed(name, variant)
    attention, mlp = (set(Targets(p).choose(layers, spec)) for p in ("attention only", "MLP only"))
    assert attention and mlp and not attention & mlp
    assert not [p for p in attention | mlp if re.search(r"mod(ulation)?\.|_mod\.|adaln_", p)]
    assert attention | mlp <= set(Targets("all blocks").choose(layers, spec))


def test_every_architecture_is_tested():
    found = {listed(name, variant)[0].id for name, variant in models()}
    # One is of text encoders, the other of files for a model that another entry recognises.
    assert found == {*ARCHITECTURES} - {"clip", "framepack"}


def test_excludes_that_contradict_the_preset_do_not_count():
    spec, _, layers = listed("ace_step", "base")
    assert not any(".ff." in path for path in Targets("default").choose(layers, spec))
    assert all(".ff." in path for path in Targets("MLP only").choose(layers, spec))


def test_default_excludes_are_shown_and_switchable():
    assert list(Targets().left_out(LAYERS, FLUX).values()) == [2]
    assert Targets(include=(r".*img_mod\.lin",)).left_out(LAYERS, FLUX) == {FLUX.excludes[0]: 1}
    assert not Targets(exclude=(".*",), include=(".*qkv",)).left_out(LAYERS, FLUX)
    for targets in (Targets(default_excludes=False), Targets("all blocks")):
        assert not targets.left_out(LAYERS, FLUX) and names(targets) == NAMES[1:6]


def test_include_readmits_and_does_not_filter():
    """musubi-tuner: skipped if excluded and not included."""
    assert names(Targets("everything", include=(".*qkv",))) == NAMES
    only = Targets("everything", exclude=(".*",), include=(".*qkv",))
    assert names(only) == [NAMES[1]]
    modulation = Targets("default", include=(r".*img_mod\.lin",))
    assert NAMES[2] in names(modulation)


def test_patterns_match_whole_names():
    assert names(Targets("everything", exclude=("img_attn",))) == NAMES


def test_patterns_without_effect_are_named():
    targets = Targets("everything", ("img_attn",), (".*qkv",), blocks="0, single_blocks.13")
    assert targets.idle(LAYERS) == ["img_attn", "single_blocks.13"]


def test_unknown_architecture_trains_everything():
    assert names(Targets("default"), arch=None) == NAMES
    assert names(Targets("attention only"), arch=None) == [NAMES[1]]


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ("0-11", NAMES[1:4]), ("12", NAMES[4:6]), ("0,12", NAMES[1:6]),
        ("single_blocks.0-12", NAMES[4:6]), ("double_blocks\nsingle_blocks.3", NAMES[1:4]),
        ("double_blocks.0.img_mlp", [NAMES[3]]), (" double_blocks.0 - 5 ", NAMES[1:4]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("preset", ["all blocks", "everything"])
def test_blocks(preset, blocks, found):
    more = LAYERS | {DIFFUSION + "time_in.0": (4, 4)}  # a number, but of no block
    assert names(Targets(preset, blocks=blocks), more) == found


def test_blocks_of_nested_stacks():
    spec, _, layers = listed("sd15", "base")
    chosen = general(
        Targets("all blocks", blocks="input_blocks.4-5, middle_block").pool(layers, spec)
    )
    assert {name.split(".")[0] for name in chosen} == {"input_blocks", "middle_block"}
    counted = Targets("all blocks", blocks="11").choose(layers, spec)
    assert counted and all("blocks.11." in path for path in counted)


def test_kinds_of_layers():
    layers = {**LAYERS, NORM: (4,), DIFFUSION + "double_blocks.0.conv": (4, 4, 3, 3)}
    conv = "double_blocks.0.conv"
    assert conv in names(Targets(), layers)
    assert conv not in names(Targets(convolutions=False), layers)
    assert NORM not in Targets("everything").choose(layers, FLUX)
    # The default excludes are of the linear layers that some norms have.
    assert NORM in Targets(norms=True).choose(layers, FLUX)
    assert NORM not in Targets(norms=True, exclude=(".*norm.*",)).choose(layers, FLUX)
    assert NORM in Targets("attention only", norms=True).choose(layers, FLUX)


@pytest.mark.parametrize(
    ("preset", "found"),
    [
        ("default", 7), ("all blocks", 7), ("everything", 8),
        ("attention only", 4), ("MLP only", 3),
    ],
)  # fmt: skip
def test_text_encoders(preset, found):
    both = {**LAYERS, **ENCODERS}
    chosen = Targets(preset, train="text encoder").choose(both, FLUX)
    assert len(chosen) == found and set(chosen) <= ENCODERS.keys()
    attention = [p for p in chosen if "attn" in p or "Attention" in p]
    assert len(attention) == {"MLP only": 0}.get(preset, 4)
    alone = Targets(preset).choose(both, FLUX)
    assert Targets(preset, train="both").choose(both, FLUX) == alone + chosen


def test_norms_and_patterns_of_text_encoders():
    chosen = Targets(norms=True, train="text encoder", exclude=("t5xxl.*",)).choose(ENCODERS, FLUX)
    assert CLIP + "layer_norm1" in chosen and not any("t5xxl" in path for path in chosen)


def test_names_in_files():
    assert file_stem(NORM) == NORM
    assert file_stem(CLIP + "mlp.fc1") == f"text_encoders.{CLIP}mlp.fc1"


@pytest.mark.timeout(60)
def test_a_pattern_with_many_ways_through_is_quick():
    spec, _, layers = listed("wan", "animate")
    assert Targets(exclude=(r"((\w|\.)+)+!", ".*.*.*.*.*.*.*.*!")).choose(layers, spec)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Targets("everything", exclude=("(",)), "regular expression"),
        (lambda: Targets("nothing"), "Unknown preset"),
        (lambda: Targets(train="nothing"), "Unknown train"),
        (lambda: Targets(blocks="1-"), "not understood"),
        (lambda: Targets(blocks="5-1"), "not understood"),
        (lambda: Targets(blocks="*"), "not understood"),
        (lambda: Targets("everything", exclude=(".*",)).choose(LAYERS, FLUX), "No module is left"),
        (lambda: Targets(blocks="99").choose(LAYERS, FLUX), "in blocks '99'"),
        (lambda: Targets(train="text encoder").choose(LAYERS, FLUX), "No module is left"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(AdapterLabError, match=says):
        make()
