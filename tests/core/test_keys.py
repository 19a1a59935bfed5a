"""Keys into stem and suffix, names of a model into paths, formats there and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS
from adapter_lab.core.archs import ARCHITECTURES, ArchSpec
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from adapter_lab.core.keys import FORMATS, ModelIndex, convert, resolve
from adapter_lab.core.keys.base import unwrap
from adapter_lab.core.keys.stems import read_stems

MODELS = [spec for spec in ARCHITECTURES.values() if "model" in spec.parts]
H = 8
ROWS = {"qkv": 3 * H, "linear1": 7 * H}


def layout(spec: ArchSpec) -> dict[str, tuple[int, ...]]:
    """Every layer of an architecture, three of each block: path -> shape."""
    paths = dict.fromkeys(
        template.format(*numbers)
        for template in spec.layers
        for numbers in itertools.product(range(3), repeat=template.count("{}"))
    )
    return {path: (ROWS.get(path.rpartition(".")[2], H), H) for path in paths}


def state(spec: ArchSpec) -> dict[str, tuple[int, ...]]:
    return {f"diffusion_model.{path}.weight": shape for path, shape in layout(spec).items()}


def lora(rows: int, columns: int = H) -> dict[str, torch.Tensor]:
    up, down = torch.zeros(rows, 2), torch.zeros(2, columns)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}


def diffusers_names(spec: ArchSpec) -> dict[str, tuple[str, tuple[int, int, int] | None, int]]:
    """Diffusers name -> (own path, slice, rows) of everything a delta can be added to."""
    shapes, names = layout(spec), {}
    for alias in spec.aliases:
        for numbers in itertools.product(range(3), repeat=alias.own.count("{}")):
            path, theirs = alias.own.format(*numbers), alias.theirs.format(*numbers)
            if path in shapes and not alias.refuse:
                first, count = alias.rows or (0, None)
                rows = shapes[path][0] - first * H if count is None else count * H
                names[theirs] = (path, (0, first * H, rows) if alias.rows else None, rows)
    return names


def keys(form: str, name: str, rows: int) -> dict[str, torch.Tensor]:
    return {FORMATS[form].write(name, suffix): t for suffix, t in lora(rows).items()}


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.id)
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_is_read_back(form, spec):
    """Own names and diffusers names of every architecture, in every format."""
    own = {path: (path, None, shape[0]) for path, shape in layout(spec).items()}
    for names in (own, diffusers_names(spec)):
        file: dict[str, torch.Tensor] = {}
        for name, (_, _, rows) in names.items():
            file |= keys(form, name, rows)
        entries, report = resolve(file, state(spec), spec)
        assert not report.unmatched
        assert report.format == form, report.verdict
        assert report.runner_up is None or report.runner_up[1] < len(names)
        assert [(e.path, e.slice) for e in entries] == [n[:2] for n in names.values()]
        assert all(e.key == f"diffusion_model.{e.path}.weight" for e in entries)


@pytest.mark.parametrize("form", FORMATS)
def test_every_suffix_is_read_back(form):
    suffixes = {s for algorithm in ALGORITHMS.values() for s in algorithm.suffixes} | {"alpha"}
    for suffix in suffixes:
        stem, *others = read_stems(
            {FORMATS[form].write("a.b0.c_1", suffix): torch.zeros(1)}
        ).values()
        assert not others
        assert list(stem.tensors) == [suffix]
        assert FORMATS[form].write("a.b0.c_1", suffix).startswith(stem.name + ".")


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
        ("a.lora_magnitude_vector", "a", "lora_magnitude_vector"),
        ("a.lora_magnitude_vector.weight", "a", "lora_magnitude_vector.weight"),
        ("a.lora_B.bias", "a", "lora_B.bias"),
        ("oft_unet_a.oft_blocks.3", "oft_unet_a", "oft_blocks.*"),
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
            for end, tensor in (("up", torch.ones(H, 2)), ("down", torch.ones(2, H))):
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
    ):
        assert unwrap(wrapped) == "diffusion_model.a.b"
    assert unwrap("lora_unet__orig_mod_a_b") == "lora_unet_a_b"
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


# --- convert


def adapter(form: str, names: dict[str, int], **extra: object) -> Adapter:
    file = Adapter(name="x.safetensors", **extra)
    for name, rows in names.items():
        file.update(keys(form, name, rows))
    return file


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.id)
def test_convert_goes_to_kohya_and_back(spec):
    """The architecture is found from the names alone, except where two share all of them."""
    names = {path: shape[0] for path, shape in layout(spec).items()}
    ours = adapter("comfyui", names, metadata={"a": "b"})
    kohya = convert(ours, "kohya", spec.id)
    stems = read_stems(kohya)
    assert all(stem.startswith("lora_unet_") and "." not in stem for stem in stems)
    back = convert(kohya, "comfyui")
    assert set(back) == set(ours)
    assert all(back[key] is ours[key] for key in ours)
    assert back.metadata == {"a": "b"}
    assert back.name == "x.safetensors"
    # and what was written is understood
    entries, report = resolve(kohya, state(spec), spec)
    assert {e.path for e in entries} == set(names)
    assert report.format == "kohya"


def test_convert_writes_the_names_that_kohya_gives_an_architecture():
    """sd-scripts: diffusers names for SD1.5, original ones for SDXL."""
    path = "middle_block.1.transformer_blocks.0.attn1.to_q"
    for spec, stem in (
        ("sd15", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("sdxl", "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"),
    ):
        (found,) = read_stems(convert(adapter("comfyui", {path: H}), "kohya", spec))
        assert found == stem


def test_convert_places_text_encoders():
    q = "text_model.encoder.layers.3.self_attn.q_proj"
    file = Adapter({f"lora_te{n}_{q.replace('.', '_')}.alpha": torch.tensor(1.0) for n in (1, 2)})
    assert set(convert(file, "comfyui")) == {
        f"text_encoders.clip_{x}.transformer.{q}.alpha" for x in "lg"
    }
    (key,) = convert({f"text_encoder.{q}.alpha": torch.tensor(1.0)}, "kohya", "sd15")
    assert key == "lora_te_text_model_encoder_layers_3_self_attn_q_proj.alpha"


def test_convert_maps_diffusers_names_and_refuses_parts_of_a_fused_weight():
    whole = adapter("diffusers", {"transformer_blocks.0.ff.net.2": H})
    (stem,) = read_stems(convert(whole, "comfyui"))
    assert stem == "diffusion_model.double_blocks.0.img_mlp.2"
    split = adapter("diffusers", {f"transformer_blocks.0.attn.to_{x}": H for x in "qkv"})
    with pytest.raises(AdapterLabError, match="3 modules.*apart.*attn.to_q"):
        convert(split, "kohya")


def test_convert_refuses_what_it_cannot_place():
    with pytest.raises(AdapterLabError, match="lora_unet_what_is_this"):
        convert(adapter("kohya", {"what.is.this": H, "img_in": H}), "comfyui")
    with pytest.raises(AdapterLabError, match="'a'"):
        convert({"a.thing": torch.zeros(1)}, "comfyui")
    # Nothing has to be known about dots, or about a file that is spelled so already.
    assert set(convert(adapter("comfyui", {"a.b": H}), "kohya")) == set(keys("kohya", "a.b", H))
    same = adapter("kohya", {"what.is.this": H})
    assert set(convert(same, "kohya")) == set(same)


def test_convert_keeps_the_scale_of_a_peft_config():
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    file = {k: t for k, t in keys("peft", "a.b", H).items() if "alpha" not in k}
    written = convert(Adapter(file, config=config), "comfyui")
    assert float(written["diffusion_model.a.b.alpha"]) == 6
    assert written.config is None
