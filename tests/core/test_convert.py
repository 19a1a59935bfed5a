"""An adapter in another spelling is the same adapter: the same change of every weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.archs import ARCHITECTURES
from adapter_lab.core.bake import merge_into
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from adapter_lab.core.keys import FORMATS, ModelIndex, convert, describe, resolve
from adapter_lab.core.keys.fuse import join, take
from adapter_lab.core.keys.stems import read_stems
from torch import Tensor

MODELS = [spec for spec in ARCHITECTURES.values() if "model" in spec.parts]
SPELLINGS = ["comfyui", "kohya", "diffusers", "lycoris", "musubi"]
H = 8
FLUX = {
    "img_in": (H, 4), "vector_in.in_layer": (H, 4), "final_layer.adaLN_modulation.1": (2 * H, H),
    "double_blocks.0.img_attn.qkv": (3 * H, H), "double_blocks.0.img_attn.proj": (H, H),
    "double_blocks.1.txt_mlp.0": (4 * H, H), "single_blocks.1.linear1": (7 * H, H),
    "single_blocks.1.linear2": (H, 5 * H),
}  # fmt: skip
ROWS = ["lora", "loha", "lokr", "full"]  # whose rows can be taken out of a file


def made(name: str) -> bool:
    """Whether the algorithm can be made for a weight, to have something to convert."""
    try:
        ALGORITHMS[name].init((H, H), AdapterConfig(name, 2, 3), torch.Generator())
    except AdapterLabError:
        return False
    return ALGORITHMS[name].parameter == "weight"


MADE = [name for name in ALGORITHMS if made(name)]


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {f"{path}.weight": torch.randn(shape, generator=generator)
             for path, shape in FLUX.items()}  # fmt: skip
    return state | {f"{path}.bias": torch.zeros(shape[0]) for path, shape in FLUX.items()}


def random(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.randn(t.shape) if t.is_floating_point() and name != "alpha" else t
        for name, t in tensors.items()
    }


def adapter(form: str, names: dict[str, tuple[int, int]], algorithm: str = "lora") -> Adapter:
    """Random factors on every name -> shape, of rank 2 at scale 3 / 2 where there is one."""
    file = Adapter(name="x.safetensors")
    for name, shape in names.items():
        rank = 14 if algorithm == "boft" else 2  # as its blocks must divide 7 H rows
        config = AdapterConfig(algorithm, rank, 3, factor=2)
        made = ALGORITHMS[algorithm].init(shape, config, torch.Generator().manual_seed(0))
        tensors = random(made.state())
        file.update({FORMATS[form].write(name, suffix): t for suffix, t in tensors.items()})
    return file


def check_same(one: Adapter, two: Adapter) -> None:
    (before, first), (after, second) = (merge_into(weights(), a) for a in (one, two))
    assert not first.unmatched and not second.unmatched, second.to_text()
    assert not [text for text in second.warnings if "more than one" in text]
    assert set(before) == set(after)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", MADE)
def test_fused_modules_in_every_spelling_and_back(name, spelling):
    torch.manual_seed(0)
    source = adapter("comfyui", FLUX, name)
    written = convert(source, spelling)
    check_same(source, written)
    back = convert(written, "comfyui")
    check_same(source, back)
    if name in ("lora", "loha"):
        fused = [s for s in read_stems(written) if s.endswith(("qkv", "linear1"))]
        assert bool(fused) == (spelling in ("comfyui", "kohya", "musubi"))
        assert set(back) == set(source)


SPLIT = {
    "transformer_blocks.0.attn.to_q": (H, H), "transformer_blocks.0.attn.to_k": (H, H),
    "transformer_blocks.0.attn.to_v": (H, H), "transformer_blocks.0.attn.to_out.0": (H, H),
    **{f"single_transformer_blocks.1.attn.to_{x}": (H, H) for x in "qkv"},
    "single_transformer_blocks.1.proj_mlp": (4 * H, H), "norm_out.linear": (2 * H, H),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", MADE)
def test_split_modules_in_every_spelling_and_back(name, spelling):
    torch.manual_seed(0)
    source = adapter("diffusers", SPLIT, name)
    written = convert(source, spelling)
    check_same(source, written)
    check_same(source, convert(written, "diffusers"))
    if name in ("lora", "loha") and spelling in ("comfyui", "kohya"):
        assert {stem.partition("blocks")[2][1:] for stem in read_stems(written)} == {
            path.partition("blocks")[2][1:].replace(".", "._"[spelling == "kohya"]) for path in
            ("x", "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj",
             "single_blocks.1.linear1")}  # fmt: skip


def test_a_fused_module_of_some_of_its_parts():
    """q and v alone: k stays as it is. Without the rows of the rest the whole is unknown."""
    torch.manual_seed(0)
    some = {name: shape for name, shape in SPLIT.items() if name.endswith(("0.attn.to_q", "to_v"))}
    source = adapter("diffusers", some)
    source["transformer.transformer_blocks.0.attn.to_q.alpha"] = torch.tensor(7.0)
    written = convert(source, "kohya")
    check_same(source, written)
    stems = set(read_stems(written))
    assert "lora_unet_double_blocks_0_img_attn_qkv" in stems
    assert "lora_unet_single_transformer_blocks_1_attn_to_v" in stems
    for form in ("comfyui", "diffusers", "lycoris"):
        check_same(source, convert(written, form))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_tensors_in_every_spelling(spelling):
    """DoRA, biases and differences go with the rows that they belong to."""
    torch.manual_seed(0)
    source = adapter("comfyui", {p: s for p, s in FLUX.items() if "blocks" in p})
    for path in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"):
        source[f"diffusion_model.{path}.dora_scale"] = torch.rand(FLUX[path][0], 1) + 1
        source[f"diffusion_model.{path}.diff_b"] = torch.randn(FLUX[path][0])
    source["diffusion_model.final_layer.adaLN_modulation.1.diff"] = torch.randn(2 * H, H)
    written = convert(source, spelling, "flux")  # HunyuanVideo's blocks have the same names
    check_same(source, written)
    check_same(source, convert(written, "comfyui", "flux"))


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.id)
def test_every_architecture_in_every_spelling(spec):
    """No name collides or gets lost; of names that the architecture has in one family only, too."""
    shapes = {template.format(*numbers): (24 * H, H) for template in spec.layers
              for numbers in itertools.product(range(2), repeat=template.count("{}"))}  # fmt: skip
    if spec.hidden in shapes:
        shapes[spec.hidden] = (H, H)
    index = ModelIndex({f"diffusion_model.{path}.weight": shape for path, shape in shapes.items()})
    down, source = torch.ones(1, H), Adapter()
    for path, shape in shapes.items():
        source[f"diffusion_model.{path}.lora_up.weight"] = torch.ones(shape[0], 1)
        source[f"diffusion_model.{path}.lora_down.weight"] = down
        source[f"diffusion_model.{path}.alpha"] = torch.tensor(1.0)
    for spelling in SPELLINGS:
        written = convert(source, spelling, spec.id)
        entries, report = resolve(written, index, spec)
        assert not report.unmatched, report.to_text()
        rows = dict.fromkeys(shapes, 0)
        for entry in entries:
            rows[entry.path] += entry.algorithm.shape[0]
        assert rows == {path: shape[0] for path, shape in shapes.items()}, spelling


def test_tensors_are_shared_and_metadata_kept():
    source = adapter("comfyui", FLUX)
    source.metadata["a"] = "b"
    kohya = convert(source, "kohya")
    back = convert(kohya, "comfyui")
    assert set(back) == set(source) and all(back[key] is source[key] for key in source)
    assert back.metadata == {"a": "b"} and back.name == "x.safetensors"
    assert (
        source["diffusion_model.img_in.lora_up.weight"] is kohya["lora_unet_img_in.lora_up.weight"]
    )


def test_a_fused_module_that_was_cut_is_joined_to_what_it_was():
    torch.manual_seed(0)
    source = adapter("comfyui", {"double_blocks.0.img_attn.qkv": (3 * H, H)})
    back = convert(convert(source, "lycoris", "flux"), "comfyui", "flux")
    assert set(back) == set(source)
    assert all(torch.equal(back[key], source[key]) for key in source)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_without_a_prefix(spelling):
    """XLabs' and Black Forest Labs'; ComfyUI has a name for the q, k and v of a single block."""
    torch.manual_seed(0)
    source = Adapter({"img_in.lora_A.weight": torch.randn(2, 4),
                      "img_in.lora_B.weight": torch.randn(H, 2)})  # fmt: skip
    for name, shape in {"double_blocks.0.processor.qkv_lora1": (3 * H, H),
                        "single_blocks.1.processor.qkv_lora": (3 * H, H),
                        "single_blocks.1.processor.proj_lora": (H, 5 * H)}.items():  # fmt: skip
        source[f"{name}.up.weight"] = torch.randn(shape[0], 2)
        source[f"{name}.down.weight"] = torch.randn(2, shape[1])
    assert describe(source).architecture == "flux"
    written = convert(source, spelling)
    check_same(source, written)
    if spelling == "comfyui":
        names = ("img_in", "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1_qkv",
                 "single_blocks.1.linear2")  # fmt: skip
        assert set(read_stems(written)) == {f"diffusion_model.{name}" for name in names}


def test_names_that_trainers_give_an_architecture():
    """sd-scripts: diffusers names for SD1.5, original ones for SDXL."""
    path = "middle_block.1.transformer_blocks.0.attn1.to_q"
    for spec, stem in (
        ("sd15", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("sdxl", "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"),
    ):
        (found,) = read_stems(convert(adapter("comfyui", {path: (H, H)}), "kohya", spec))
        assert found == stem
    z_image = adapter("comfyui", {"layers.0.attention.qkv": (3 * H, H)})
    assert set(read_stems(convert(z_image, "musubi", "z_image"))) == {
        f"lora_unet_layers_0_attention_to_{x}" for x in "qkv"}  # fmt: skip


Q = "text_model.encoder.layers.3.self_attn.q_proj"
T5 = "encoder.block.0.layer.1.DenseReluDense.wi_0"


@pytest.mark.parametrize(
    ("stem", "form", "spec", "written"),
    [
        (f"lora_te1_{Q.replace('.', '_')}", "comfyui", None,
         f"text_encoders.clip_l.transformer.{Q}"),
        (f"lora_te2_{Q.replace('.', '_')}", "comfyui", None,
         f"text_encoders.clip_g.transformer.{Q}"),
        (f"text_encoder.{Q}", "kohya", "sd15", f"lora_te_{Q.replace('.', '_')}"),
        (f"text_encoder.{Q}", "kohya", "sdxl", f"lora_te1_{Q.replace('.', '_')}"),
        (f"lora_te3_{T5.replace('.', '_')}", "comfyui", None,
         f"text_encoders.t5xxl.transformer.{T5}"),
        (f"text_encoders.t5xxl.transformer.{T5}", "kohya", None,
         f"lora_te3_{T5.replace('.', '_')}"),
        (f"lora_te2_{Q.replace('.', '_')}", "comfyui", "hunyuan_video",
         f"text_encoders.clip_l.transformer.{Q}"),
        (f"text_encoders.clip_l.transformer.{Q}", "kohya", "hunyuan_video",
         f"lora_te2_{Q.replace('.', '_')}"),
        (f"text_encoder_2.{Q}", "comfyui", "hunyuan_video",
         f"text_encoders.clip_l.transformer.{Q}"),
        ("lora_te1_layers_0_mlp_up_proj", "comfyui", "hunyuan_video",
         "text_encoders.llama.transformer.model.layers.0.mlp.up_proj"),
        ("lora_te_layers_0_mlp_up_proj", "comfyui", None,
         "text_encoders.transformer.model.layers.0.mlp.up_proj"),
        ("text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj", "kohya", None,
         "lora_te_layers_0_mlp_up_proj"),
    ],
)  # fmt: skip
def test_text_encoders(stem, form, spec, written):
    (key,) = convert({f"{stem}.diff": torch.ones(1)}, form, spec)
    assert key == f"{written}.diff"


def test_oft_of_sd_scripts_keeps_its_prefix():
    """Its alpha and constraint are not those of LyCORIS' OFT of the same suffix."""
    path = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    stem = f"oft_unet_{path.replace('.', '_')}"
    source = {f"{stem}.oft_blocks": torch.zeros(2, 4, 4), f"{stem}.alpha": torch.tensor(1.0)}
    ours = convert(source, "comfyui", "sdxl")
    assert set(ours) == {f"diffusion_model.{path}.{x}" for x in ("kohya_oft_blocks", "alpha")}
    assert set(convert(ours, "kohya", "sdxl")) == set(source)


def test_embeddings_stay():
    key = "bundle_emb.cat.string_to_param.*"
    written = convert(Adapter(adapter("comfyui", FLUX) | {key: torch.ones(2)}), "kohya")
    assert key in written


def test_refuses_what_has_no_place():
    strange = adapter("kohya", {"what.is.this": (H, H), "img_in": (H, 4)})
    with pytest.raises(AdapterLabError, match="lora_unet_what_is_this"):
        convert(strange, "comfyui")
    with pytest.raises(AdapterLabError, match="'a'"):
        convert({"a.thing": torch.zeros(1)}, "comfyui")
    # Nothing has to be known about dots, or about a file that is spelled so already.
    plain = convert(adapter("comfyui", {"a.b": (H, H)}), "kohya")
    assert set(plain) == set(adapter("kohya", {"a.b": (H, H)}))
    same = adapter("kohya", {"what.is.this": (H, H)})
    assert set(convert(same, "kohya")) == set(same)


def test_the_scale_of_a_peft_config_is_written():
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    file = {k: t for k, t in adapter("peft", {"a.b": (H, H)}).items() if "alpha" not in k}
    written = convert(Adapter(file, config=config), "comfyui")
    assert float(written["diffusion_model.a.b.alpha"]) == 6
    assert written.config is None


def test_what_peft_alone_has_is_said_in_other_words():
    """A bias of the up factor, magnitudes as a vector and the factors of an embedding."""
    torch.manual_seed(0)
    source = {
        "a.lora_A.weight": torch.randn(2, 6),
        "a.lora_B.weight": torch.randn(4, 2),
        "a.lora_B.bias": torch.randn(4),
        "a.alpha": torch.tensor(6.0),
        "b.lora_A.weight": torch.randn(2, 4),
        "b.lora_B.weight": torch.randn(4, 2),
        "b.lora_magnitude_vector": torch.rand(4) + 1,
        "c.lora_embedding_A": torch.randn(2, 9),
        "c.lora_embedding_B": torch.randn(5, 2),
    }
    sizes = {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (4, 4), "c.weight": (9, 5)}
    index = {name: torch.randn(size) for name, size in sizes.items()}
    written = convert(Adapter(source), "comfyui")
    suffixes = {key.removeprefix("diffusion_model.") for key in written}
    assert suffixes == {
        *(f"{x}.lora_{y}.weight" for x in "abc" for y in ("up", "down")),
        "a.alpha",
        "a.diff_b",
        "b.alpha",
        "b.dora_scale",
        "c.alpha",
    }
    assert written["diffusion_model.b.dora_scale"].shape == (4, 1)
    (before, _), (after, _) = (merge_into(index, file) for file in (source, written))
    assert set(before) == set(sizes)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "loha"])
def test_join_adds_up_ranks_and_keeps_scales(name):
    """Pieces of other ranks, scales and rows; a None leaves its rows alone."""
    torch.manual_seed(0)
    pieces, expected = [], []
    for rows, rank, alpha in ((4, 2, 3.0), (6, 1, 5.0)):
        made = ALGORITHMS[name].init((rows, H), AdapterConfig(name, rank, alpha), torch.Generator())
        tensors = random(made.state())
        pieces.append((tensors, rows))
        expected.append(ALGORITHMS[name].load(tensors).delta(torch.zeros(rows, H)))
    joined = join([pieces[0], (None, 2), pieces[1]])
    delta = ALGORITHMS[name].load(joined).delta(torch.zeros(12, H))
    torch.testing.assert_close(delta, torch.cat([expected[0], torch.zeros(2, H), expected[1]]))
    assert ALGORITHMS[name].load(joined).rank == 3


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_take_is_a_selection_of_rows(name, tucker):
    torch.manual_seed(0)
    config = AdapterConfig(name, 2, 3, factor=4, tucker=tucker)
    made = ALGORITHMS[name].init((16, 8, 3, 3), config, torch.Generator().manual_seed(0))
    tensors = random(made.state())
    whole = ALGORITHMS[name].load(tensors).delta(torch.zeros(16, 8, 3, 3))
    rows = torch.cat([torch.arange(8, 16), torch.arange(4)])
    taken = take(tensors, rows)
    assert taken is not None
    delta = ALGORITHMS[name].load(taken).delta(torch.zeros(12, 8, 3, 3))
    torch.testing.assert_close(delta, whole[rows])
    if name == "lokr":
        assert take(tensors, torch.arange(3)) is None
