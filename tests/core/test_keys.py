"""Keys into stem and suffix, names of a model into paths, formats there and back."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from adapter_lab.core.adapters import suffixes
from adapter_lab.core.archs import ARCHITECTURES, ArchSpec
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.keys import FORMATS, ModelIndex, resolve
from adapter_lab.core.keys.base import unwrap
from adapter_lab.core.keys.stems import read_stems
from hypothesis import given
from hypothesis import strategies as st

MODELS = [spec for spec in ARCHITECTURES.values() if "model" in spec.parts]
READERS = [form.id for form in FORMATS.values() if not form.like]
DATA = Path(__file__).parents[1] / "data"
H = 8
# Of real layouts a few have no entry of their own, or share one: architecture -> file with shapes.
LISTS = sorted((DATA / "keys").glob("*.json"))
Place = tuple[str, tuple[int, int, int] | None, int]  # own path, slice, rows


def layout(spec: ArchSpec) -> dict[str, tuple[int, ...]]:
    """Every layer of an architecture, two of each block: path -> shape."""
    fused = {alias.own for alias in spec.aliases if alias.rows}
    return {
        template.format(*numbers): (12 * H if template in fused else 2 * H, H)
        for template in spec.layers
        for numbers in itertools.product(range(2), repeat=template.count("{}"))
    }


def state(spec: ArchSpec) -> dict[str, tuple[int, ...]]:
    return {f"diffusion_model.{path}.weight": shape for path, shape in layout(spec).items()}


def lora(rows: int, columns: int = H) -> dict[str, torch.Tensor]:
    up, down = torch.zeros(rows, 2), torch.zeros(2, columns)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}


def their_names(spec: ArchSpec) -> dict[str, Place]:
    """Alias -> own path, slice and rows of everything a delta can be added to."""
    shapes, names = layout(spec), {}
    meanings: dict[str, set[str]] = {}
    hidden = shapes.get(spec.hidden, (H, H))[0]
    for alias in spec.aliases:
        for numbers in itertools.product(range(2), repeat=alias.own.count("{}")):
            path, theirs = alias.own.format(*numbers), alias.theirs.format(*numbers)
            meanings.setdefault(theirs.replace(".", "_"), set()).add(path)
            if path not in shapes or alias.refuse or theirs in shapes:
                continue
            offset, rows = alias.span(shapes[path][0], hidden)
            if offset + rows <= shapes[path][0]:
                names[theirs] = (path, (0, offset, rows) if alias.rows else None, rows)
    alone = {name: place for name, place in names.items()
             if len(meanings[name.replace(".", "_")]) == 1}  # fmt: skip
    spelled = Counter(name.replace(".", "_") for name in (*alone, *shapes))
    return {name: place for name, place in alone.items() if spelled[name.replace(".", "_")] == 1}


def keys(form: str, name: str, rows: int) -> dict[str, torch.Tensor]:
    return {FORMATS[form].write(name, suffix): t for suffix, t in lora(rows).items()}


def check_names(spec: ArchSpec, form: str, names: dict[str, Place]) -> None:
    file: dict[str, torch.Tensor] = {}
    for name, (_, _, rows) in names.items():
        file |= keys(form, name, rows)
    entries, report = resolve(file, state(spec), spec)
    assert not report.unmatched
    assert report.format == (FORMATS[form].like or form), report.verdict
    assert report.runner_up is None or report.runner_up[1] < len(names)
    assert [(e.path, e.slice) for e in entries] == [place[:2] for place in names.values()]
    assert all(e.key == f"diffusion_model.{e.path}.weight" for e in entries)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_is_read_back(form):
    spec = ARCHITECTURES["flux"]
    check_names(spec, form, {path: (path, None, s[0]) for path, s in layout(spec).items()})
    check_names(spec, form, their_names(spec))


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.id)
def test_names_of_every_architecture(spec):
    """Own and other names, dotted and underscored."""
    own = {path: (path, None, shape[0]) for path, shape in layout(spec).items()}
    for form in ("comfyui", "kohya"):
        check_names(spec, form, own)
        names = their_names(spec)
        if names:
            check_names(spec, form, names)


def _index(shapes: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {f"diffusion_model.{name}.weight": tuple(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_real_layouts(path):
    """Every module of a file that a real library wrote finds its weight, by one format alone."""
    listed = json.loads(path.read_text("utf-8"))
    file = {name: torch.empty(shape, device="meta") if shape else torch.tensor(4.0)
            for name, shape in listed["keys"].items()}  # fmt: skip
    folder = {name.stem.replace("_", ""): name for name in (DATA / "models").glob("*.json")}
    models = json.loads(folder[listed["architecture"].replace("_", "")].read_text("utf-8"))
    chosen = [listed["variant"]] if "variant" in listed else list(models)
    reports = [resolve(file, _index(models[variant]))[1] for variant in chosen]
    report = max(reports, key=lambda one: len(one.matched))
    assert not report.unmatched
    assert report.matched
    assert report.format == (FORMATS[listed["format"]].like or listed["format"])
    assert report.runner_up is None or report.runner_up[1] < len(report.matched)
    assert not [text for text in report.warnings if not text.startswith("Scale assumed")]


@pytest.mark.parametrize("form", FORMATS)
def test_every_suffix_is_read_back(form):
    respelled = [theirs for theirs in FORMATS[form].spellings.values() if FORMATS[form].private]
    for suffix in (name for name in suffixes() if name not in respelled):
        suffix = suffix.replace("*", "12")
        # Such a name is an adapter's only beside a tensor that nothing else has.
        beside = {"weight": ["on_input"]}.get(suffix, [])
        names = [FORMATS[form].write("a.b0.c_1", name) for name in (*beside, suffix)]
        stem, *others = read_stems(dict.fromkeys(names, torch.zeros(1))).values()
        assert not others
        assert list(stem.tensors) == [*beside, suffix]
        assert all(name.startswith(stem.name + ".") for name in names)


NAME = st.from_regex(r"[a-z]{1,6}(_[a-z0-9]{1,4})?|[0-9]{1,2}", fullmatch=True)
NAMES = st.lists(NAME, min_size=2, max_size=6).filter(lambda names: not names[0].isdecimal())


@given(NAMES, st.sampled_from([f for f in READERS if FORMATS[f].hint]))
def test_any_path_is_found_in_any_format(names, form):
    """Whatever a model's modules are called, in every format, without a table of names."""
    path = ".".join(names)
    file = keys(form, path, 4)
    others = {f"{path}.x.weight": (4, H), f"x.{path}.weight": (4, H)}
    entries, report = resolve(file, {f"{path}.weight": (4, H)} | others)
    assert [e.path for e in entries] == [path], report.to_text()
    assert report.format == form


@given(st.dictionaries(st.text(max_size=20), st.just(None), max_size=8))
def test_no_key_breaks_the_reader(names):
    stems = read_stems(dict.fromkeys(names, torch.zeros(1)))
    kept = sum(len(stem.tensors) + len(stem.unknown) for stem in stems.values())
    assert kept == len(names)


@pytest.mark.parametrize(
    ("key", "stem", "suffix"),
    [
        ("lora_unet_a_0.lora_up.weight", "lora_unet_a_0", "lora_up.weight"),
        ("lora_unet_a_0.lora_mid.weight", "lora_unet_a_0", "lora_mid.weight"),
        ("transformer.a.0.lora_A.weight", "transformer.a.0", "lora_down.weight"),
        ("base_model.model.a.lora_B.default.weight", "base_model.model.a", "lora_up.weight"),
        ("base_model.model.a.lora_B.my_name-2.weight", "base_model.model.a", "lora_up.weight"),
        ("base_model.model.a.hada_w1_a.default", "base_model.model.a", "hada_w1_a"),
        ("base_model.model.a.lokr_w2", "base_model.model.a", "lokr_w2"),
        ("a.lora_A", "a", "lora_down.weight"),  # Mochi
        ("unet.a.attn1.to_q.lora.up.weight", "unet.a.attn1.to_q", "lora_up.weight"),
        ("unet.a.to_q.lora_linear_layer.down.weight", "unet.a.to_q", "lora_down.weight"),
        ("unet.a.processor.to_q_lora.up.weight", "unet.a.processor.to_q", "lora_up.weight"),
        ("lora_unet_a.dora_scale", "lora_unet_a", "dora_scale"),
        ("a.lora_magnitude_vector.my.weight", "a", "magnitude"),
        ("a.lora_B.default.bias", "a", "lora_up.bias"),
        ("a.oft_R.default.weight", "a", "oft_R.weight"),
        ("a.boft_R.default", "a", "boft_R"),
        ("a.ia3_l.default", "a", "ia3_l"),
        ("a.hra_u.default", "a", "hra_u"),
        ("a.vera_lambda_b.default", "a", "vera_lambda_b"),
        ("a.glora_B.default.Xd", "a", "glora_B.Xd"),
        ("a.glora_D.X", "a", "glora_D.X"),
        ("b.0.processor.qkv_lora1.down.weight", "b.0.processor.qkv_lora1", "lora_down.weight"),
        ("lora_unet_a.oft_blocks", "lora_unet_a", "oft_blocks"),
        ("oft_unet_a.oft_blocks", "oft_unet_a", "kohya_oft_blocks"),
        ("a.lora_magnitude_vector", "a", "magnitude"),
        ("a.lora_magnitude_vector.weight", "a", "magnitude"),
        ("a.lora_B.bias", "a", "lora_up.bias"),
        ("oft_unet_a.oft_blocks.3", "oft_unet_a", "kohya_oft_blocks.3"),
        ("a.diff_b", "a", "diff_b"),
    ],
)
def test_splits_at_the_longest_known_suffix(key, stem, suffix):
    (found,) = read_stems({key: torch.zeros(1)}).values()
    assert (found.name, list(found.tensors), found.unknown) == (stem, [suffix], [])


def test_files_of_early_diffusers():
    """The adapter beside the layer, its name in the middle; read with and without "unet."."""
    where = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor"
    for prefix in ("unet.", ""):
        file = {}
        for name in ("to_q", "to_out"):
            for end, tensor in (("up", torch.ones(2 * H, 2)), ("down", torch.ones(2, H))):
                file[f"{prefix}{where}.{name}_lora.{end}.weight"] = tensor
        entries, _ = resolve(file, state(ARCHITECTURES["sd15"]), "sd15")
        block = "input_blocks.1.1.transformer_blocks.0.attn2"
        assert [e.path for e in entries] == [f"{block}.to_q", f"{block}.to_out.0"]


def test_an_unknown_suffix_stays_with_its_module():
    strange = {"a.b.lora_A.weight": 1, "a.b.lora_C.weight": 1, "a.c.what": 1}
    stems = read_stems({key: torch.zeros(1) for key in strange})
    assert stems["a.b"].unknown == ["lora_C.weight"]
    assert stems["a.c"].unknown == ["what"]
    (stem,) = read_stems({"lora_unet_a_0.some.thing": torch.zeros(1)}).values()
    assert (stem.name, stem.unknown) == ("lora_unet_a_0", ["some.thing"])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({3: torch.zeros(1)}, "3"),
        ({"a.alpha": "1.0"}, "str"),
        (dict.fromkeys(["a.lora_A.one.weight", "a.lora_A.two.weight"], torch.zeros(1)), "twice"),
        (dict.fromkeys(["a.lora_A.weight", "a.lora_down.weight"], torch.zeros(1)), "twice"),
    ],
)
def test_refuses_keys_without_a_meaning(bad, said):
    with pytest.raises(AdapterLabError, match=said):
        read_stems(bad)


def test_unwrap():
    for wrapped in (
        "diffusion_model.a._orig_mod.b",
        "module.diffusion_model.a.b",
        "model.diffusion_model.a.b",
        "module.model.diffusion_model._orig_mod.a.b",
        "diffusion_model.a._fsdp_wrapped_module.b",
        "diffusion_model.a._checkpoint_wrapped_module.b",
    ):
        assert unwrap(wrapped) == "diffusion_model.a.b"
    assert unwrap("lora_unet__orig_mod_a_b") == "lora_unet_a_b"
    assert unwrap("base_model.model.model.diffusion_model.a") == (
        "base_model.model.diffusion_model.a"
    )
    assert unwrap("my_module.model.a") == "my_module.model.a"


@pytest.mark.parametrize(
    "root", ["diffusion_model.", "model.diffusion_model.", "", "module.", "_orig_mod."]
)
def test_index_knows_modules_by_their_own_names(root):
    shapes = {"a.0.weight": (3, 2), "a.0.bias": (3,), "b.modulation": (1, 6, 2), "n.weight": (3,)}
    index = ModelIndex({root + name: shape for name, shape in shapes.items()})
    assert dict(index) == {"a.0": (3, 2), "b.modulation": (1, 6, 2), "n": (3,)}
    assert index.part("model")["a.0"].key == f"{root}a.0.weight"
    assert index.locate(f"{root}a.0") == index.locate(f"{root}a.0.weight")
    assert index.locate("nothing") is None


def test_index_takes_tensors_and_keeps_text_encoders_apart():
    index = ModelIndex({
        "model.diffusion_model.a.weight": torch.zeros(3, 2),
        "clip_l.transformer.text_model.b.weight": torch.zeros(4, 2),
        "clip_g.transformer.text_model.b.weight": torch.zeros(5, 2),
        "first_stage_model.encoder.weight": torch.zeros(6, 2),
    })  # fmt: skip
    assert dict(index) == {"a": (3, 2)}
    assert index.part("clip_l")["text_model.b"].shape == (4, 2)
    assert index.part("clip_g")["text_model.b"].key.startswith("clip_g")
    assert "first_stage_model.encoder" in index.part("other")
    with pytest.raises(AdapterLabError, match="not text"):
        ModelIndex({1: (2, 2)})


def test_index_does_not_lose_a_name_to_a_wrapper():
    index = ModelIndex({"a.weight": (1, 1), "module.a.weight": (2, 2)})
    assert dict(index) == {"a": (1, 1), "module.a": (2, 2)}
